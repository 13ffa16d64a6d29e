"""From a kernel's source to a kernel: memory, then disk, then the compiler."""
from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass, replace

from ..disk_cache import DiskCache, cache_directory
from ..once import AfterFork, Once, once
from ..runtime import BinaryError, Kernel, Queue
from .cache_key import key_facts
from .kernel_source import KernelSource
from .shipped_sources import sources_dir

SIZE_VARIABLE = "MOE_XE_CACHE_SIZE"
DEFAULT_SIZE = 1 << 30  # bytes
NUMBER_VARIABLE = "MOE_XE_KERNELS"
DEFAULT_NUMBER = 256    # of 2 MB each on the CPU device


@dataclass
class Stats:
    """How kernels were come by."""

    compiled: int = 0
    memory_hits: int = 0
    disk_hits: int = 0


class Compiler(AfterFork):
    """Compiles each kernel once per context and device, whichever threads ask.

    most: kernels in memory, beyond which the least recently used leave; they come back from disk. One that leaves while it
    runs is kept by its launch until that has ended.
    """

    def __init__(self, disk: DiskCache, most: int = DEFAULT_NUMBER):
        self._disk = disk
        self._kernels: Once[Kernel] = Once(most)
        self._stats = Stats()
        super().__init__()

    def kernel(self, queue: Queue, source: KernelSource) -> Kernel:
        """Raises CompileError; ValueError for a bad signature."""
        made = False

        def make() -> Kernel:
            nonlocal made
            made = True
            return self._make(queue, source)

        # A kernel keeps its context alive, so these ids are not reused.
        kernel = self._kernels.get((queue.context_id, queue.device_id, source), make)
        if not made:
            with self._lock:
                self._stats.memory_hits += 1
        return kernel

    def stats(self) -> Stats:
        with self._lock:
            return replace(self._stats)

    def _make(self, queue: Queue, source: KernelSource) -> Kernel:
        facts = key_facts(source, queue.device)
        binary = self._disk.load(facts)
        if binary is not None:
            try:
                kernel = Kernel.from_binary(queue, binary, source.name, source.signature)
                with self._lock:
                    self._stats.disk_hits += 1
                return kernel
            except BinaryError as error:
                self._disk.drop(facts, str(error))

        options = [*source.options, f"-I{sources_dir() / 'include'}", f"-I{sources_dir()}"]
        kernel = Kernel.compile(queue, source.text, source.name, source.signature, options)
        with self._lock:
            self._stats.compiled += 1
        try:
            binary = kernel.binary()
            self._disk.store(facts, binary)
            # as the next process will have it: what the compiler left behind it is larger than the kernel
            return Kernel.from_binary(queue, binary, source.name, source.signature)
        except BinaryError as error:
            warnings.warn(f"kernel {source.name} cannot be cached on disk: {error}", RuntimeWarning, stacklevel=3)
        return kernel


def kernel_cache() -> DiskCache:
    """The user's compiled kernels on disk, as the environment says. Raises ValueError for a size that is no number."""
    size = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_SIZE)
    if not re.fullmatch("[0-9]{1,18}", size):
        raise ValueError(f"{SIZE_VARIABLE} is a number of bytes, of 1 to 18 digits, not {size!r}")
    return DiskCache(cache_directory() / "kernels", int(size))


def kernels_in_memory() -> int:
    """How many kernels stay in memory, as the environment says. Raises ValueError for what is no such number."""
    number = os.environ.get(NUMBER_VARIABLE) or str(DEFAULT_NUMBER)
    if not re.fullmatch("[0-9]{1,9}", number) or int(number) < 1:
        raise ValueError(f"{NUMBER_VARIABLE} is a number of kernels, from 1 to 999999999, not {number!r}")
    return int(number)


@once
def _default_compiler() -> Compiler:
    return Compiler(kernel_cache(), kernels_in_memory())


def compile_kernel(queue: Queue, source: KernelSource) -> Kernel:
    """The kernel of this source for the queue's device, compiled or from a cache.

    Raises CompileError with the compiler's log; ValueError for a bad signature.
    """
    return _default_compiler().kernel(queue, source)


def stats() -> Stats:
    """What compile_kernel has done in this process."""
    return _default_compiler().stats()
