import functools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_xe import once as once_module
from moe_xe.once import Once, once

SOON = 30   # seconds, far more than it takes


def in_process(code: str) -> str:
    """What it prints, run where only moe_xe/once.py is loaded."""
    load = f"import importlib.util as u; s = u.spec_from_file_location('once', {once_module.__file__!r}); o = u.module_from_spec(s)\n"
    load += "import sys; sys.modules['once'] = o; s.loader.exec_module(o)\n"
    done = subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, timeout=SOON)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Slow:
    """A function that waits, counts its calls and then does as told."""

    def __init__(self, *results):
        self.started, self.go_on = threading.Event(), threading.Event()
        self.results = list(results)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        self.started.set()
        assert self.go_on.wait(SOON)
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result


def results_of(threads: int, ask, slow: Slow) -> list:
    """What threads get, an error or a value: one asks, the others while it is busy."""
    results = []

    def work():
        try:
            results.append(ask())
        except BaseException as error:
            results.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    assert slow.started.wait(SOON)
    slow.go_on.set()
    for worker in workers:
        worker.join(SOON)
        assert not worker.is_alive()
    return results


def test_threads_share_one_call():
    slow = Slow("value")
    assert results_of(8, functools.partial(Once().get, 1, slow), slow) == ["value"] * 8
    assert slow.calls == 1


def test_a_decorated_function_runs_once_for_each_arguments():
    calls = []

    @once
    def double(number):
        """Documented."""
        calls.append(number)
        return 2 * number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(double, [1, 2] * 20)) == [2, 4] * 20
    assert sorted(calls) == [1, 2] and double.__doc__ == "Documented."
    double.cache_clear()
    double(1)
    assert len(calls) == 3


def test_an_error_reaches_all_that_wait_and_is_not_kept():
    values, error = Once(), ValueError("failed")
    slow = Slow(error, "value", *["value"] * 3)
    results = results_of(4, functools.partial(values.get, 1, slow), slow)
    assert error in results and all(result in (error, "value") for result in results)
    assert values.get(1, lambda: "later") in ("later", "value")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit()], ids=repr)
def test_an_interrupt_is_its_own_threads_and_another_one_tries_again(interrupt):
    slow = Slow(interrupt, "value")
    results = results_of(4, functools.partial(Once().get, 1, slow), slow)
    assert results.count("value") == 3 and interrupt in results and slow.calls == 2


def test_signals_at_any_time_leave_nothing_locked():
    """Each key can be had after thousands of interrupts of both the thread that makes it and those that wait."""
    code = """
import signal, threading, time
values = o.Once(limit=50)
stop = False
def interrupt(*_):
    raise KeyboardInterrupt
def work():
    while not stop:
        for key in range(100):
            values.get(key, lambda: time.sleep(0) or key)
others = [threading.Thread(target=work) for _ in range(2)]
for other in others: other.start()
interrupts, end = 0, time.monotonic() + 1.5
signal.signal(signal.SIGALRM, interrupt)
while time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
        for key in range(100):
            values.get(key, lambda: time.sleep(0) or key)
    except KeyboardInterrupt:
        interrupts += 1
signal.setitimer(signal.ITIMER_REAL, 0)
stop = True
for other in others:
    other.join(10)
    assert not other.is_alive()
for key in range(100):
    assert values.get(key, lambda: key) == key
assert interrupts > 100, interrupts
print("done")
"""
    assert in_process(code) == "done\n"


def test_the_least_recently_used_leave():
    values = Once(limit=3)
    for key in (1, 2, 3, 1, 4):
        values.get(key, lambda: key)
    assert len(values) == 3
    assert [values.get(key, lambda: "new") for key in (1, 3, 4)] == [1, 3, 4]
    assert values.get(2, lambda: "new") == "new"


def test_a_forked_child_waits_for_no_thread_of_its_parent():
    code = """
import os, threading
values, going, end = o.Once(), threading.Event(), threading.Event()
values.get(1, lambda: "made")
def make():
    going.set()
    end.wait()
threading.Thread(target=values.get, args=(2, make)).start()
going.wait()
values._lock.acquire()
child = os.fork()
if child == 0:
    os._exit(not (values.get(1, lambda: "again") == "made" and values.get(2, lambda: "mine") == "mine"))
values._lock.release()
status = os.waitpid(child, 0)[1]
end.set()
print(status)
"""
    assert in_process(code) == "0\n"
