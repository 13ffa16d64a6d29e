"""xesim: runs the BMG (Xe2) machine code of SYCL kernels on a CPU.

    from xesim import compile_bmg, Kernel
    build = compile_bmg("kernel.cpp")                  # or a .spv file
    k = build.kernel("gemm")                           # or Kernel(dump_folder, "gemm")
    stats = k.launch(global_size, local_size, [A, B, C, np.int32(n)], seed=0)
"""
from .kernel import Kernel
from .memory import Local, Memory
from .native import SimError
from .stats import Counts, Stats
from .toolchain import Build, compile_bmg, missing_tools

__all__ = ["Build", "Counts", "Kernel", "Local", "Memory", "SimError", "Stats", "compile_bmg", "missing_tools"]
