"""What the grouped GEMM compiles to: no spills on any device, and a K loop that is mostly dpas."""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.jit.source import generate
from moe_xe.plan.gemm.heuristics import generic_config
from moe_xe.plan.problem import FLOATS, Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale, RowsFormat, WeightLayout

missing = spirv.missing() or ocloc.missing()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

DEVICES = ["bmg", "pvc", "lnl-m", "ptl-h"]
SHAPES = [(5760, 2880), (2880, 2880)]
# (instructions - dpas) / dpas of the prefill tile's K loop, on bmg
LIMIT = {WeightLayout.ekn: 0.6, WeightLayout.enk: 0.65}
LIMIT_TF32 = 0.65


@cache
def image(problem: GroupedGemmProblem) -> bytes:
    root = sources_dir()
    return spirv.compile_to_spirv(generate(problem, kernels.default_config(problem)), [f"-I{root / 'include'}", f"-I{root}"])


def summary_of(problem: GroupedGemmProblem, device: str):
    return summarize(ocloc.build(image(problem), device, kernels.LARGE_GRF), "grouped_gemm")


@pytest.mark.few(1)
@pytest.mark.parametrize("device", DEVICES)
def test_the_options_of_a_launch_give_the_same_code(device):
    """What SYCL passes to the driver for grf_size<256>."""
    spirv_module = image(GroupedGemmProblem(*SHAPES[0], Dtype.bf16, Dtype.bf16))

    def code(options: str) -> dict[str, str]:
        folder = ocloc.build(spirv_module, device, options).folder
        return {file.name: file.read_text() for file in folder.iterdir() if file.suffix == ".asm" or file.name == ".ze_info"}

    shown = code(kernels.LARGE_GRF)
    assert shown == code("-ze-opt-large-register-file -ze-opt-level=2")
    assert any("dpas" in text for text in shown.values()) and shown != code("-ze-opt-disable")


def name(problem: GroupedGemmProblem) -> str:
    return f"{problem.n}x{problem.k}-{problem.input.value}-{problem.weights.value}{'-gathered' if problem.gathered else ''}"


PROBLEMS = [problem for n, k in SHAPES for problem in kernels.variants(n, k, FLOATS if n == 5760 else [Dtype.bf16])]


@pytest.mark.few(3)
@pytest.mark.parametrize("problem", [
    pytest.param(p, marks=[pytest.mark.full] * (p.n != 5760 or p.input is Dtype.f16 or p.tf32 and p.gathered)) for p in PROBLEMS], ids=name)
def test_inner_loop(problem):
    loop = kernels.prefill_loop(summary_of(problem, "bmg").loops)
    print(f"{name(problem)}: {loop.instructions} instructions, {loop.dpas} dpas, {loop.messages} messages, {loop.other_per_dpas:.2f} other a dpas")
    assert loop.other_per_dpas <= (LIMIT_TF32 if problem.tf32 else LIMIT[problem.weights])


@pytest.mark.few(4)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", [
    pytest.param(p, marks=[pytest.mark.full] * (p.tf32 and p.gathered)) for p in PROBLEMS if p.n == 5760 and p.input is not Dtype.f16], ids=name)
def test_no_spills(problem, device):
    summary = summary_of(problem, device)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    assert summary.grf == 256


@pytest.mark.full
@pytest.mark.parametrize("layout", WeightLayout)
def test_no_spills_with_everything(layout):
    """Bias, gathered tokens, tails of K and N, fp32 outputs; test_no_spills_of_activations has an activation, too."""
    problem = GroupedGemmProblem(1000, 1000, Dtype.bf16, Dtype.f32, layout, bias=Dtype.f32, gathered=True)
    assert summary_of(problem, "bmg").spill_bytes == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("fields", [dict(ranks=8), dict(rows_format=RowsFormat.batched)], ids=["ranks", "batched"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", WeightLayout)
def test_where_rows_lie_changes_no_loop(layout, device, fields):
    """Nor are there spills."""
    problem = GroupedGemmProblem(*SHAPES[0], Dtype.bf16, Dtype.bf16, layout)
    plain, other = (summarize(kernels.build(p, kernels.default_config(problem), device), "grouped_gemm")
                    for p in (problem, replace(problem, **fields)))
    assert other.spill_bytes == 0
    loops, plain_loops = ([(loop.instructions, loop.message_kinds) for loop in summary.loops] for summary in (other, plain))
    assert loops == plain_loops


@pytest.mark.parametrize("layout, limit", [(WeightLayout.enk, 0.85), (WeightLayout.ekn, 0.7)])
def test_decode_inner_loop(layout, limit):
    """Sub-groups of 16 tokens x 64 features."""
    problem = GroupedGemmProblem(2880, 2880, Dtype.bf16, Dtype.bf16, layout)
    summary = summarize(kernels.build(problem, kernels.default_config(problem, 16), "bmg"), "grouped_gemm")
    loop, = summary.loops
    assert (loop.dpas, summary.spill_bytes) == (64, 0) and loop.other_per_dpas <= limit


SILU = Activation()
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=7.0)
BF16, F32 = Dtype.bf16, Dtype.f32


def block_gemms(layout: WeightLayout) -> dict[str, GroupedGemmProblem]:
    """The two GEMMs of Qwen3's and gpt-oss' blocks, with everything that the block fuses into them."""
    first = dict(weights=layout, gathered=True)
    second = dict(weights=layout, scattered=True, row_scale=RowScale.outputs)
    return {
        "qwen3 first": GroupedGemmProblem(1536, 2048, BF16, BF16, activation=SILU, slots=8, **first),
        "qwen3 second": GroupedGemmProblem(2048, 768, BF16, F32, **second),
        "one slot, second": GroupedGemmProblem(2048, 768, BF16, BF16, **second),
        "shared, first": GroupedGemmProblem(1536, 2048, BF16, BF16, activation=SILU, slots=9, shared=1, row_scale=RowScale.sums, **first),
        "shared, second": GroupedGemmProblem(2048, 768, BF16, F32, shared=1, **second),
        "gpt-oss first": GroupedGemmProblem(5760, 2880, BF16, BF16, activation=OAI, slots=4, bias=BF16, **first),
        "gpt-oss second": GroupedGemmProblem(2880, 2880, BF16, F32, bias=BF16, **second),
    }


LIKE_OTHERS = ("qwen3 first", "qwen3 second", "one slot, second", "shared, second", "gpt-oss second")
ONE_LAYOUT = {"shared, first": WeightLayout.enk, "gpt-oss first": WeightLayout.ekn}      # the other one with --full
BLOCK_GEMMS = [pytest.param(problem, id=f"{name}-{layout.value}",
                            marks=[pytest.mark.full] * (name in LIKE_OTHERS or ONE_LAYOUT.get(name, layout) is not layout))
               for layout in WeightLayout for name, problem in block_gemms(layout).items()]


@pytest.mark.few(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", BLOCK_GEMMS)
def test_no_spills_of_the_block(problem, device):
    summary = summary_of(problem, device)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    assert summary.grf == 256
    if device == "bmg":
        assert kernels.prefill_loop(summary.loops).other_per_dpas <= 0.65


@pytest.mark.parametrize("layout, activation", [
    *(pytest.param(WeightLayout.enk, kind, marks=[pytest.mark.full] * (kind is not ActivationKind.swiglu_oai)) for kind in ActivationKind),
    pytest.param(WeightLayout.ekn, ActivationKind.gelu, marks=pytest.mark.full)])
def test_no_spills_of_activations(layout, activation):
    """Of neighbours, with biases, factors and tails: the most that the epilogue can have."""
    problem = GroupedGemmProblem(1016, 1000, BF16, F32, layout, bias=F32, gathered=True, slots=3, row_scale=RowScale.sums,
                                 activation=Activation(activation, interleaved=True, alpha=1.702, limit=7.0))
    summary = summary_of(problem, "bmg")
    assert (summary.spill_bytes, summary.private_bytes) == (0, 0)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["qwen3 first", pytest.param("gpt-oss first", marks=pytest.mark.full),
                                  pytest.param("shared, first", marks=pytest.mark.full), "gpt-oss second"])
@pytest.mark.parametrize("layout", list(WeightLayout))
def test_no_spills_of_the_generic_main_loop(layout, name):
    problem = block_gemms(layout)[name]
    summary = summarize(kernels.build(problem, generic_config(problem, 8192), "bmg"), "grouped_gemm")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
