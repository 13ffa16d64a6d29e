"""moe_xe's own kernels as Xe machine code: which variants there are, and what their K loops consist of."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..jit.shipped_sources import sources_dir
from ..jit.source import KERNEL_NAME, generate
from ..plan.gemm.config import TileConfig, XeConfig
from ..plan.model.devices import record_named
from ..plan.problem import Dtype, GroupedGemmProblem, WeightLayout
from ..plan.xe.candidates import choose_xe_config
from . import ocloc, spirv
from .dump import Dump
from .listing import Loop, summarize

# At run time SYCL asks the driver for grf_size<256> by -ze-opt-large-register-file -ze-opt-level=2: the code is the same.
GRF_OPTION = "-ze-intel-{}-GRF-per-thread"
LARGE_GRF = GRF_OPTION.format(256)
PREFILL_ROWS, PREFILL_EXPERTS = 8192, 32


def variants(n: int, k: int, dtypes: Sequence[Dtype]) -> Iterator[GroupedGemmProblem]:
    """Every combination of dtype, weight layout and gathered rows; float32 is tf32 here."""
    for dtype in dtypes:
        for layout in (WeightLayout.ekn, WeightLayout.enk):
            for gathered in (False, True):
                yield GroupedGemmProblem(n, k, dtype, dtype, layout, gathered=gathered, tf32=dtype is Dtype.f32)


def default_config(problem: GroupedGemmProblem, total_rows: int = PREFILL_ROWS, num_experts: int = PREFILL_EXPERTS) -> XeConfig:
    """What a launch of so many rows takes on an Arc B580."""
    return choose_xe_config(problem, total_rows, num_experts, record_named("b580"))


def build(problem: GroupedGemmProblem, config: TileConfig, device: str) -> Dump:
    """The machine code of one grouped GEMM. Raises as spirv.compile_to_spirv and ocloc.build do."""
    root = sources_dir()
    image = spirv.compile_to_spirv(generate(problem, config), [f"-I{root / 'include'}", f"-I{root}"])
    return ocloc.build(image, device, GRF_OPTION.format(config.grf_size) if isinstance(config, XeConfig) else "")


def prefill_loop(loops: Sequence[Loop]) -> Loop:
    """The K loop of the tallest tile: the one with the most dpas."""
    return max(loops, key=lambda loop: loop.dpas)


def report(problem: GroupedGemmProblem, device: str) -> dict:
    """One line of `moe-xe isa`: counts are of the prefill tile's innermost K loop; other: neither dpas nor message."""
    summary = summarize(build(problem, default_config(problem), device), KERNEL_NAME)
    loop = prefill_loop(summary.loops)
    return {"kernel": KERNEL_NAME, "device": device, "dtype": "tf32" if problem.tf32 else problem.input.value,
            "layout": problem.weights.value, "gathered": problem.gathered, "grf": summary.grf, "spill_bytes": summary.spill_bytes,
            "slm_bytes": summary.slm_bytes, "dpas": loop.dpas, "messages": loop.messages,
            "other": loop.instructions - loop.dpas - loop.messages, "other_per_dpas": loop.other_per_dpas}
