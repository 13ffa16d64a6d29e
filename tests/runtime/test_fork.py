"""The SYCL runtime does not survive a fork: a child says so at once, and one that leaves moe_xe alone is not disturbed."""
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETUP = """
import os, sys, threading, time, warnings
import torch
import moe_xe
from moe_xe.runtime import ForkError
warnings.filterwarnings("ignore")

def call():
    a, w, counts = torch.ones(3, 5), torch.ones(2, 4, 5), torch.tensor([1, 2], dtype=torch.int32)
    return moe_xe.grouped_gemm(a, w, counts)

def child_of(work):
    '''Exit code of a child that does this, or "hangs".'''
    pid = os.fork()
    if pid == 0:
        work()
        sys.exit(7)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"

def refused():
    for use in (call, moe_xe.devices, lambda: moe_xe.runtime.Queue.create("cpu")):
        try:
            use()
        except ForkError as error:
            assert "spawn" in str(error)
        else:
            os._exit(1)

"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", SETUP + textwrap.dedent(code)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_a_child_can_use_what_its_parent_only_imported():
    assert run("print(child_of(lambda: (call() == 5).all() or os._exit(1)))") == "7\n"


def test_a_child_of_a_process_that_used_it_gets_an_error_and_may_leave_it_alone():
    code = """
        call()
        print(child_of(refused), child_of(lambda: None))
        class Squares(torch.utils.data.Dataset):
            def __len__(self):
                return 6
            def __getitem__(self, i):
                import moe_xe
                return torch.tensor(i) ** 2
        print(torch.cat(list(torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2, multiprocessing_context="fork"))).tolist())
        assert (call() == 5).all()
    """
    assert run(code) == "7 7\n[0, 1, 4, 9, 16, 25]\n"


def test_a_child_that_is_forked_while_threads_are_inside():
    """Some launch, one makes kernels: whatever they hold, the child does not wait for it."""
    code = """
        from moe_xe.jit import stats
        from moe_xe.runtime import Kernel, Queue
        call()
        done = False
        def launch():
            while not done:
                call()
        def reload():
            queue = Queue.create("cpu")
            kernel = Kernel.compile(queue, SOURCE, "vector_add", "ppppiqf")
            while not done:
                Kernel.from_binary(queue, kernel.binary(), "vector_add", "ppppiqf")
        threads = [threading.Thread(target=work) for work in (launch, launch, reload)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        results = [child_of(lambda: (refused(), stats(), os._exit(7))) for _ in range(3)] + [child_of(lambda: None) for _ in range(2)]
        print(results)
        done = True
    """
    source = Path(__file__).with_name("vector_add.cpp").read_text()
    assert run(code.replace("SOURCE", repr(source))) == "[7, 7, 7, 7, 7]\n"
