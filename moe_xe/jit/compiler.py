"""From a kernel's source to a kernel: memory, then disk, then the compiler."""
from __future__ import annotations

import functools
import os
import re
import threading
import warnings
from concurrent.futures import Future
from dataclasses import dataclass, replace

from ..disk_cache import DiskCache, cache_directory
from .cache_key import key_facts
from .kernel_source import KernelSource
from .shipped_sources import sources_dir
from ..runtime import BinaryError, Kernel, Queue

SIZE_VARIABLE = "MOE_XE_CACHE_SIZE"
DEFAULT_SIZE = 1 << 30  # bytes


@dataclass
class Stats:
    """How kernels were come by."""

    compiled: int = 0
    memory_hits: int = 0
    disk_hits: int = 0


class Compiler:
    """Compiles each kernel once per context and device, whichever threads ask."""

    def __init__(self, disk: DiskCache):
        self._disk = disk
        self._lock = threading.Lock()
        self._kernels: dict[tuple[int, int, KernelSource], Future[Kernel]] = {}
        self._stats = Stats()

    def kernel(self, queue: Queue, source: KernelSource) -> Kernel:
        """Raises CompileError; ValueError for a bad signature."""
        # A kernel keeps its context alive, so these ids are not reused.
        key = (queue.context_id, queue.device_id, source)
        with self._lock:
            future = self._kernels.get(key)
            ours = future is None
            if ours:
                future = self._kernels[key] = Future()
            else:
                self._stats.memory_hits += 1
        if ours:
            try:
                future.set_result(self._make(queue, source))
            except BaseException as error:
                # Those who wait see the error; those who come later try again.
                with self._lock:
                    del self._kernels[key]
                future.set_exception(error)
        return future.result()

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
            except BinaryError:
                self._disk.drop(facts)

        options = [*source.options, f"-I{sources_dir() / 'include'}", f"-I{sources_dir()}"]
        kernel = Kernel.compile(queue, source.text, source.name, source.signature, options)
        with self._lock:
            self._stats.compiled += 1
        try:
            self._disk.store(facts, kernel.binary())
        except BinaryError as error:
            warnings.warn(f"kernel {source.name} cannot be cached on disk: {error}", RuntimeWarning, stacklevel=3)
        return kernel


def kernel_cache() -> DiskCache:
    """The user's compiled kernels on disk, as the environment says. Raises ValueError for a size that is no number."""
    size = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_SIZE)
    if not re.fullmatch("[0-9]{1,18}", size):
        raise ValueError(f"{SIZE_VARIABLE} is a number of bytes, of 1 to 18 digits, not {size!r}")
    return DiskCache(cache_directory() / "kernels", int(size))


@functools.cache
def _default_compiler() -> Compiler:
    return Compiler(kernel_cache())


def compile_kernel(queue: Queue, source: KernelSource) -> Kernel:
    """The kernel of this source for the queue's device, compiled or from a cache.

    Raises CompileError with the compiler's log; ValueError for a bad signature.
    """
    return _default_compiler().kernel(queue, source)


def stats() -> Stats:
    """What compile_kernel has done in this process."""
    return _default_compiler().stats()
