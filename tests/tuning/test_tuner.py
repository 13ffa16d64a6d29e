"""Choices by measuring: what is measured, when, how often, and what is kept of it."""
import io
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from moe_xe import timing
from moe_xe.disk_cache import DamageWarning, DiskCache, key_of
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.tuning import Entry, Tuner, TuningStore, default_tuner, is_capturing, tuner as tuner_module
from moe_xe.tuning.store import SIZE_LIMIT

from .example import DEFAULT, OUTER_DEFAULT, PROBLEM, STATIC, Device, config, key

CPU = torch.device("cpu")
TIMES = {DEFAULT: 0.004, config(2): 0.001, config(3): 0.0025}
FASTEST = config(2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times of single calls."""
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)


@pytest.fixture
def store(tmp_path) -> TuningStore:
    return TuningStore(DiskCache(tmp_path / "tuning", SIZE_LIMIT))


class Runs:
    """A call that takes a known time in each configuration, and counts."""

    def __init__(self, seconds=TIMES):
        self.seconds, self.count = seconds, Counter()

    def __call__(self, config):
        self.count[config] += 1
        time.sleep(self.seconds[config])


def choose(tuner, run, of=key(), default=DEFAULT, capturing=False):
    return tuner.config_for(of, default, lambda: [each for each in TIMES if each != default], run, CPU, capturing)


def test_measures_once_then_memory_then_disk(store):
    first, run = Tuner(store, 0), Runs()
    assert choose(first, run) == FASTEST
    assert set(run.count) == set(TIMES) and run.count[FASTEST] >= 3
    entry = first.known()[key()]
    assert (entry.config, entry.default, set(entry.microseconds)) == (FASTEST, DEFAULT, set(TIMES)) and entry.speedup > 1.5
    run.count.clear()
    assert choose(first, run) == FASTEST
    assert choose(Tuner(store, 0), run) == FASTEST
    assert not run.count
    assert choose(first, run, key(num_experts=9)) == FASTEST and run.count


@pytest.mark.parametrize("other", [Device(driver_version="1.2.4"), Device(name="another CPU")])
def test_choices_of_another_driver_or_device_are_not_used(store, other):
    run = Runs()
    choose(Tuner(store, 0), run, key(other))
    run.count.clear()
    choose(Tuner(store, 0), run)
    assert run.count[DEFAULT]


def measured(monkeypatch, seconds):
    """Lets the tuner measure these seconds."""
    by_call = lambda call: seconds[call.args[0]]
    monkeypatch.setattr(tuner_module, "_first_sight", lambda call, device: by_call(call))
    monkeypatch.setattr(tuner_module, "interleaved_medians",
                        lambda calls, device, budget: {name: by_call(call) for name, call in calls.items()})


@pytest.mark.parametrize("best, chosen", [(0.99, DEFAULT), (0.985, DEFAULT), (0.975, FASTEST), (0.5, FASTEST), (1.2, DEFAULT)])
def test_the_default_stays_unless_another_is_faster_by_two_percent(store, monkeypatch, best, chosen):
    measured(monkeypatch, {DEFAULT: 1.0, FASTEST: best, config(3): 1.0})
    assert choose(Tuner(store), Runs()) == chosen


def test_what_is_much_slower_at_first_sight_is_not_measured_again(store, monkeypatch):
    again = []
    measured(monkeypatch, {DEFAULT: 2.0, FASTEST: 1.0, config(3): 1.6})
    medians = tuner_module.interleaved_medians
    monkeypatch.setattr(tuner_module, "interleaved_medians", lambda calls, *rest: again.extend(calls) or medians(calls, *rest))
    tuner = Tuner(store)
    assert choose(tuner, Runs()) == FASTEST
    assert again == [DEFAULT, FASTEST]
    assert tuner.known()[key()].microseconds == {DEFAULT: 2e6, FASTEST: 1e6, config(3): 1.6e6}


def test_time_budget(store):
    little, much = Runs(), Runs()
    choose(Tuner(store, 0), little)
    begin = time.perf_counter()
    choose(Tuner(store, 0.2), much, key(num_experts=9))
    assert time.perf_counter() - begin > 0.2
    assert much.count[FASTEST] > little.count[FASTEST]


def test_a_candidate_that_fails_is_left_out_with_a_warning(store):
    def run(each):
        if each == FASTEST:
            raise RuntimeError("does not compile")
        Runs()(each)

    with pytest.warns(RuntimeWarning, match="left out: does not compile"):
        assert choose(Tuner(store, 0), run) == config(3)
    assert FASTEST not in store.load(key()).microseconds


def test_what_the_default_raises_is_raised_and_nothing_is_kept(store):
    def run(each):
        raise ValueError("wrong call")

    tuner = Tuner(store, 0)
    with pytest.raises(ValueError, match="wrong call"):
        choose(tuner, run)
    assert tuner.known() == {} and store.load(key()) is None
    assert choose(tuner, Runs()) == FASTEST


def test_no_candidates(store):
    run = Runs()
    assert Tuner(store, 0).config_for(key(), DEFAULT, lambda: [], run, CPU, False) == DEFAULT
    run.count.clear()
    assert choose(Tuner(store, 0), run) == DEFAULT and not run.count


def test_a_capture_measures_nothing_and_remembers_nothing(store):
    tuner = Tuner(store, 0)

    def forbidden(*arguments):
        raise AssertionError("called within a capture")

    assert tuner.config_for(key(), DEFAULT, forbidden, forbidden, CPU, True) == DEFAULT
    assert tuner.known() == {} and list(store.entries()) == []
    assert choose(tuner, Runs()) == FASTEST
    for knows in (tuner, Tuner(store)):
        assert knows.config_for(key(), DEFAULT, forbidden, forbidden, CPU, True) == FASTEST


def test_is_capturing(monkeypatch):
    assert not is_capturing(CPU)
    xpu = torch.device("xpu", 0)
    monkeypatch.setattr(torch.xpu, "device", lambda device: warnings.catch_warnings())    # any context
    for answer in (True, False):
        monkeypatch.setattr(torch.xpu, "is_current_stream_capturing", lambda: answer, raising=False)
        assert is_capturing(xpu) == answer
    monkeypatch.delattr(torch.xpu, "is_current_stream_capturing")
    assert not is_capturing(xpu)


def test_threads_that_want_one_key_measure_once(store):
    alone, together = Runs(), Runs()
    choose(Tuner(store, 0), alone, key(num_experts=9))
    tuner = Tuner(store, 0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: choose(tuner, together), range(8))) == {FASTEST}
    assert together.count.total() < 2 * alone.count.total()


def test_keys_are_not_measured_at_the_same_time(store):
    inside, overlaps = threading.Lock(), []

    def run(each):
        overlaps.append(not inside.acquire(blocking=False))
        time.sleep(TIMES[each])
        if not overlaps[-1]:
            inside.release()

    tuner = Tuner(store, 0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda experts: choose(tuner, run, key(num_experts=experts)), range(1, 5)))
    assert len(tuner.known()) == 4 and not any(overlaps)


def test_a_damaged_choice_is_measured_again_and_rewritten(store):
    run = Runs()
    choose(Tuner(store, 0), run)
    file = store.disk.directory / key_of(key().facts())
    file.write_bytes(file.read_bytes()[:-3])
    run.count.clear()
    with pytest.warns(DamageWarning):
        assert choose(Tuner(store, 0), run) == FASTEST and run.count
    assert store.load(key()).config == FASTEST


@pytest.mark.parametrize("stored", [STATIC, cpu_config(PROBLEM, "avx512"), OUTER_DEFAULT], ids=["schedule", "isa", "kind"])
def test_a_stored_choice_that_cannot_serve_is_measured_again(store, stored):
    of = replace(key(), cpu_isa="avx2")
    store.store(of, Entry(stored, stored, {stored: 1.0}))
    assert choose(Tuner(store, 0), Runs(), of) == FASTEST
    assert store.load(of).config == FASTEST


def test_a_stored_choice_may_have_other_vector_instructions_of_the_cpu(store):
    of, stored = replace(key(), cpu_isa="avx512"), cpu_config(PROBLEM, "avx2")
    store.store(of, Entry(stored, DEFAULT, {stored: 1.0, DEFAULT: 2.0}))
    assert choose(Tuner(store, 0), None, of) == stored


def test_a_cache_that_cannot_be_written_costs_no_choice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot be opened"):
        tuner = Tuner(TuningStore(DiskCache(tmp_path / "file" / "tuning", SIZE_LIMIT)), 0)
    run = Runs()
    assert choose(tuner, run) == FASTEST
    run.count.clear()
    assert choose(tuner, run) == FASTEST and not run.count


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_terminals_only(store, monkeypatch, capfd):
    choose(Tuner(store, 0), Runs())
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TERM", "xterm")
    for progress in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        choose(Tuner(store, 0, progress), Runs(), key(num_experts=9 + progress))
        assert ("tuning grouped_gemm" in sys.stderr.getvalue()) == progress


def test_environment_says_how_long(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    for text, seconds in (("0.5", 0.5), ("0", 0.0)):
        monkeypatch.setenv("MOE_XE_TUNE_SECONDS", text)
        assert default_tuner.__wrapped__().seconds == seconds
    monkeypatch.delenv("MOE_XE_TUNE_SECONDS")
    assert default_tuner.__wrapped__().seconds == 3
    for text in ("a while", "-1", "inf", "nan", ""):
        monkeypatch.setenv("MOE_XE_TUNE_SECONDS", text)
        with pytest.raises(ValueError, match="MOE_XE_TUNE_SECONDS is a number of seconds"):
            default_tuner.__wrapped__()


def choose_in_process(directory, results):
    """Of its own; `results` gets the choice and how often something ran for it."""
    os.environ |= {"MOE_XE_CACHE_DIR": str(directory), "MOE_XE_TUNE_SECONDS": "0.1"}
    run = Runs()
    results.put((choose(default_tuner(), run), run.count.total()))


def run_until_killed(directory, started):
    os.environ |= {"MOE_XE_CACHE_DIR": str(directory), "MOE_XE_TUNE_SECONDS": "1000"}
    choose(default_tuner(), lambda each: started.set())


def test_processes_share_choices(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_xe.tuning"])     # imported once for all of them
    results, started = context.Queue(), context.Event()

    def start(target, argument):
        process = context.Process(target=target, args=(tmp_path, argument))
        process.start()
        return process

    killed = start(run_until_killed, started)
    assert started.wait(60)
    killed.kill()     # in the middle of measuring
    killed.join()
    together = [start(choose_in_process, results) for _ in range(3)]
    found = [results.get(timeout=60) for _ in together]
    assert {choice for choice, _ in found} == {FASTEST} and max(runs for _, runs in found) > 0
    second = start(choose_in_process, results)
    assert results.get(timeout=60) == (FASTEST, 0)     # it measures nothing
    for process in (*together, second):
        process.join()
