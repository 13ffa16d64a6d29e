"""SYCL source or SPIR-V -> BMG machine code, ready to run: a thin use of moe_xe.isa."""
from pathlib import Path

from moe_xe.isa import ocloc, spirv

from .kernel import Kernel

DEVICE = "bmg"


def missing_tools():
    """What is missing to compile SYCL to BMG code, as text; "" where nothing is."""
    return ", ".join(filter(None, [spirv.missing(), ocloc.missing()]))


class Build:
    """The kernels of one source. dump: moe_xe.isa.dump.Dump; names: the kernels' names."""
    def __init__(self, dump):
        self.dump, self.names = dump, dump.kernels

    def kernel(self, name):
        return Kernel(self.dump, name)


def compile_bmg(source, options="", sycl_options=()):
    """Compiles a SYCL source (path, or the text itself) or a .spv file; returns a Build.

    options: for ocloc, e.g. "-ze-intel-256-GRF-per-thread"; sycl_options: a list for the SYCL compiler (folders absolute).
    Machine code is cached; SYCL sources are compiled anew, because the headers that they include may have changed.
    """
    if "\n" not in str(source) and str(source).endswith(".spv"):
        module = Path(source).read_bytes()
    else:
        text = str(source) if "\n" in str(source) else Path(source).read_text()
        module = spirv.compile_to_spirv(text, sycl_options)
    return Build(ocloc.build(module, DEVICE, options))
