import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from moe_xe.disk_cache import DiskCache
from moe_xe.jit.cache_key import key_facts
from moe_xe.jit.compiler import DEFAULT_SIZE, Compiler, Stats, kernel_cache, kernels_in_memory
from moe_xe.runtime import CompileError, Queue


@pytest.fixture
def disk(tmp_path):
    return DiskCache(tmp_path / "cache", DEFAULT_SIZE)


def test_compiles_once_then_memory_then_disk(queue, vector_add, disk, check_adds):
    first = Compiler(disk)
    kernel = first.kernel(queue, vector_add)
    assert first.kernel(queue, vector_add) is kernel
    assert first.stats() == Stats(compiled=1, memory_hits=1, disk_hits=0)
    second = Compiler(disk)
    reloaded = second.kernel(queue, vector_add)
    assert second.stats() == Stats(compiled=0, memory_hits=0, disk_hits=1)
    check_adds(kernel)
    check_adds(reloaded)


def test_queues_of_one_context_share_kernels(queue, vector_add, disk):
    compiler = Compiler(disk)
    assert compiler.kernel(Queue.create("cpu"), vector_add) is compiler.kernel(queue, vector_add)


def test_options_make_another_kernel(queue, vector_add, disk):
    compiler = Compiler(disk)
    compiler.kernel(queue, vector_add)
    compiler.kernel(queue, replace(vector_add, options=("-DMOE_XE_TEST=1",)))
    assert compiler.stats().compiled == 2


def test_threads_that_want_one_kernel_compile_it_once(queue, vector_add, disk):
    compiler = Compiler(disk)
    with ThreadPoolExecutor(8) as pool:
        kernels = list(pool.map(lambda _: compiler.kernel(queue, vector_add), range(8)))
    assert compiler.stats() == Stats(compiled=1, memory_hits=7, disk_hits=0)
    assert all(kernel is kernels[0] for kernel in kernels)


def test_every_waiting_thread_sees_the_compile_error(queue, vector_add, disk):
    compiler = Compiler(disk)
    broken = replace(vector_add, text="int f() { return undeclared_name; }")

    def error_of(_):
        with pytest.raises(CompileError) as caught:
            compiler.kernel(queue, broken)
        return caught.value.log

    with ThreadPoolExecutor(4) as pool:
        assert all("undeclared_name" in log for log in pool.map(error_of, range(4)))
    assert compiler.stats().compiled == 0


def test_a_failure_is_not_kept(queue, vector_add, disk, monkeypatch):
    compiler = Compiler(disk)
    monkeypatch.setattr(compiler, "_make", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compiler.kernel(queue, vector_add)
    monkeypatch.undo()
    compiler.kernel(queue, vector_add)
    assert compiler.stats().compiled == 1


def test_an_interrupt_leaves_no_thread_waiting(queue, vector_add, disk, monkeypatch):
    """It is the interrupted thread's own; another that waits compiles, and so does who comes later."""
    compiler = Compiler(disk)
    make, asked = compiler._make, threading.Barrier(2)
    interrupts = [KeyboardInterrupt()]

    def interrupted(*arguments):
        if interrupts:
            asked.wait(30)
            time.sleep(0.2)     # until the other one waits
            raise interrupts.pop()
        return make(*arguments)

    monkeypatch.setattr(compiler, "_make", interrupted)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(compiler.kernel, queue, vector_add)
        asked.wait(30)
        second = pool.submit(compiler.kernel, queue, vector_add)
        assert isinstance(first.exception(60), KeyboardInterrupt)
        assert second.result(60) is compiler.kernel(queue, vector_add)


def test_the_least_recently_used_kernels_leave_memory(queue, vector_add, disk, check_adds):
    compiler = Compiler(disk, most=2)
    sources = [replace(vector_add, text=f"{vector_add.text}\n// {number}") for number in range(3)]
    kernels = [compiler.kernel(queue, source) for source in (*sources[:2], sources[0], sources[2])]
    assert compiler.stats() == Stats(compiled=3, memory_hits=1)
    assert compiler.kernel(queue, sources[0]) is kernels[0]
    check_adds(compiler.kernel(queue, sources[1]))
    assert compiler.stats() == Stats(compiled=3, memory_hits=2, disk_hits=1)
    check_adds(kernels[1])


def test_threads_that_compile_leave_no_file_open(queue, vector_add, disk):
    compiler = Compiler(disk)

    def compile_in_a_thread(number):
        source = replace(vector_add, text=f"{vector_add.text}\n// {number}")
        thread = threading.Thread(target=compiler.kernel, args=(queue, source))
        thread.start()
        thread.join()
        return len(os.listdir("/proc/self/fd"))

    assert len({compile_in_a_thread(number) for number in range(3)}) == 1


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5", "²", "9" * 5000])
def test_environment_names_the_number_of_kernels(monkeypatch, number):
    monkeypatch.setenv("MOE_XE_KERNELS", "12")
    assert kernels_in_memory() == 12
    monkeypatch.delenv("MOE_XE_KERNELS")
    assert kernels_in_memory() == 256
    monkeypatch.setenv("MOE_XE_KERNELS", number)
    with pytest.raises(ValueError, match="MOE_XE_KERNELS is a number of kernels"):
        kernels_in_memory()


def test_binary_that_the_driver_refuses_is_replaced(queue, vector_add, disk, check_adds):
    facts = key_facts(vector_add, queue.device)
    disk.store(facts, b"whole, but no binary")
    compiler = Compiler(disk)
    check_adds(compiler.kernel(queue, vector_add))
    assert compiler.stats() == Stats(compiled=1)
    assert disk.load(facts) == compiler.kernel(queue, vector_add).binary()


def test_compiles_where_the_cache_cannot_be_used(queue, vector_add, tmp_path, check_adds):
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others"):
        compiler = Compiler(DiskCache(tmp_path, DEFAULT_SIZE))
    check_adds(compiler.kernel(queue, vector_add))
    assert compiler.stats() == Stats(compiled=1)


def test_environment_names_place_and_size(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MOE_XE_CACHE_SIZE", raising=False)
    assert kernel_cache().directory == tmp_path / "kernels" and kernel_cache().size_limit == 1 << 30
    monkeypatch.setenv("MOE_XE_CACHE_SIZE", "12345")
    assert kernel_cache().size_limit == 12345
    monkeypatch.setenv("MOE_XE_CACHE_SIZE", "")
    assert kernel_cache().size_limit == 1 << 30
    monkeypatch.setenv("MOE_XE_CACHE_SIZE", "9" * 18)       # more than any disk
    assert kernel_cache().size_limit == 10**18 - 1 and kernel_cache().store({"kernel": "k"}, b"binary")
    for size in ("1 GB", "-1", "²", "٣", "1e9", "0x10", "9" * 19, "9" * 5000, " 1", "1\n"):
        monkeypatch.setenv("MOE_XE_CACHE_SIZE", size)
        with pytest.raises(ValueError, match="MOE_XE_CACHE_SIZE is a number of bytes"):
            kernel_cache()
