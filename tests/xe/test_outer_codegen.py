"""What the weights' gradient and the GEMMs of backward compile to: no spills on any device, and loops that are mostly dpas."""
from __future__ import annotations

from functools import cache

import pytest

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.outer_source import KERNEL_NAME, generate
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.plan.outer.config import Gathered, OuterProblem
from moe_xe.plan.outer.heuristics import xe_outer_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowScale, WeightLayout

missing = spirv.missing() or ocloc.missing()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F32 = Dtype.bf16, Dtype.f32
DEVICES = ["bmg", "pvc", "lnl-m", "ptl-h"]
SHAPES = [(1536, 2048), (2048, 768)]     # of Qwen3-30B-A3B's w13 and w2
PROBLEMS = [OuterProblem(p, q, BF16, output, gathered=gathered, slots=8, accumulate=accumulate)
            for p, q in SHAPES for output in (BF16, F32) for gathered in Gathered for accumulate in (False, True)]
OF_RANKS = [OuterProblem(1536, 2048, BF16, BF16, gathered=gathered, slots=8, ranks=8) for gathered in Gathered]
# (instructions - dpas) / dpas of the loop over rows, on bmg: half of the operands' elements are moved between registers
LIMIT, LIMIT_LEFT_F32 = 1.8, 2.0


def name(problem: OuterProblem) -> str:
    return (f"{problem.p}x{problem.q}-{problem.output.value}-{problem.gathered.value}"
            f"{'-accumulate' if problem.accumulate else ''}")


def like_another(problem: OuterProblem) -> bool:
    return problem.accumulate or problem.p != 1536 or problem.output is F32 and problem.gathered is not Gathered.left


@cache
def image(problem: OuterProblem) -> bytes:
    root = sources_dir()
    return spirv.compile_to_spirv(generate(problem, xe_outer_config(problem)), [f"-I{root / 'include'}", f"-I{root}"])


@pytest.mark.few(2)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", [pytest.param(p, marks=[pytest.mark.full] * like_another(p)) for p in PROBLEMS], ids=name)
def test_no_spills_and_inner_loop(problem, device):
    summary = summarize(ocloc.build(image(problem), device, kernels.LARGE_GRF), KERNEL_NAME)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    assert summary.grf == 256
    if device == "bmg" and not problem.accumulate:
        loop = kernels.prefill_loop(summary.loops)
        print(f"{name(problem)}: {loop.instructions} instructions, {loop.dpas} dpas, {loop.messages} messages, "
              f"{loop.other_per_dpas:.2f} other a dpas")
        left_f32 = problem.gathered is Gathered.left and problem.output is F32
        assert loop.other_per_dpas <= (LIMIT_LEFT_F32 if left_f32 else LIMIT)


@pytest.mark.few(1)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", OF_RANKS, ids=name)
def test_no_spills_with_rows_of_several_ranks(problem, device):
    """The sums stay in their registers from run to run."""
    summary = summarize(ocloc.build(image(problem), device, kernels.LARGE_GRF), KERNEL_NAME)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())


# the GEMMs of backward read the weights as they lie, transposed: of [E, N, K] ones they are [E, K, N]'s loop, and the reverse
BACKWARD = {
    "rows of the hidden states' gradient": dict(n=2048, k=1536, output=F32, scattered=True),
    "the same, with factors": dict(n=2048, k=1536, output=F32, scattered=True, row_scale=RowScale.outputs),
    "gradient of the second GEMM's input": dict(n=768, k=2048, output=BF16, gathered=True, slots=8),
    "the same, with factors of rows": dict(n=768, k=2048, output=BF16, gathered=True, slots=8, row_scale=RowScale.outputs),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", list(WeightLayout))
@pytest.mark.parametrize("form", [pytest.param(form, marks=[pytest.mark.full] * ("factors" not in form)) for form in BACKWARD])
def test_gemms_of_backward(form, layout):
    problem = GroupedGemmProblem(input=BF16, weights=layout, **BACKWARD[form])
    summary = summarize(kernels.build(problem, kernels.default_config(problem), "bmg"), "grouped_gemm")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    assert kernels.prefill_loop(summary.loops).other_per_dpas <= 0.9
