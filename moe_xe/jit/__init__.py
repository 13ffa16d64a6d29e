"""Run-time compilation: source in, kernel out, with a cache in memory and on disk."""

from .compiler import Stats, compile_kernel, stats
from .kernel_source import KernelSource
from .shipped_sources import sources_dir

__all__ = ["KernelSource", "Stats", "compile_kernel", "sources_dir", "stats"]
