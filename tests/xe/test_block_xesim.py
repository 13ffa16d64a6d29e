"""The MoE block's two GEMMs as BMG code, executed by xesim: pairs and activations, row factors, scattered rows, shared experts."""
from __future__ import annotations

import pytest

from moe_xe.plan.gemm.heuristics import generic_config
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale

from .case import EKN, ENK, config_of, default_config, missing, name, run

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
COUNTS = [240, 0, 1, 120, 15, 70, 33]       # every height of a tile, whole and in part
SHARED_COUNTS = [70, 70, 240, 0, 15, 33]
DECODE = [1, 0, 2, 0, 0, 5, 1, 0, 16, 0, 40, 3] * 2
SILU = Activation()
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
NO_GATE = Activation(ActivationKind.relu2, gated=False)


def act(kind: str, **fields) -> Activation:
    return Activation(ActivationKind(kind), **fields)


# Width and number of heights. N and K leave tails of every tile and step; slots from 1 to 10; every default width; True: with --full only
FIRST = [
    (256, 5, dict(activation=SILU, slots=8), True),
    (192, 5, dict(activation=act("gelu"), slots=3, bias=F32, input=F16, output=F16), True),
    (128, 5, dict(activation=act("swiglu_oai", alpha=1.3, limit=0.5), slots=2, bias=BF16, output=F32), True),
    (64, 3, dict(activation=act("silu", limit=0.8), row_scale=RowScale.sums)),
    (256, 5, dict(activation=OAI, slots=4, bias=BF16)),
    (192, 5, dict(activation=act("silu", interleaved=True), slots=10, row_scale=RowScale.sums, bias=F16, input=F16, output=F16), True),
    (128, 5, dict(activation=act("gelu_tanh", interleaved=True), output=F32), True),
    (64, 5, dict(activation=act("gelu", interleaved=True), slots=5, bias=F32), True),
    (256, 3, dict(activation=NO_GATE, slots=6, bias=BF16)),
    (128, 5, dict(activation=act("silu", gated=False), slots=7, row_scale=RowScale.sums), True),
]


def first(layout, input=BF16, output=BF16, n=208, k=136, **fields) -> GroupedGemmProblem:
    """The first GEMM: gathered tokens, an activation."""
    return GroupedGemmProblem(n, k, input, output, layout, gathered=True, **fields)


def second(layout, output=F32, n=200, k=136, **fields) -> GroupedGemmProblem:
    """The second GEMM: rows go to their pairs."""
    return GroupedGemmProblem(n, k, fields.pop("input", BF16), output, layout, scattered=True, **fields)


@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("width, heights, fields", [
    pytest.param(width, heights, fields, id=f"{width} {name(first(ENK, **fields))}", marks=[pytest.mark.full] * any(full))
    for width, heights, fields, *full in FIRST])
def test_first_gemm(width, heights, fields, layout):
    problem = first(layout, **fields)
    run(problem, config_of(problem, width, heights=heights), COUNTS, groups=(9,), unused=21)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("activation", [SILU, act("silu", interleaved=True)], ids=["halves", "interleaved"])
def test_first_gemm_of_tf32(activation, layout):
    problem = first(layout, F32, F32, k=68, activation=activation, slots=2, tf32=True)
    run(problem, config_of(problem, heights=3), COUNTS, groups=(5,))


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("activation, bias", [(SILU, None), (OAI, BF16)], ids=["halves", "interleaved"])
def test_first_gemm_of_few_rows(activation, bias, layout):
    """The shortest tiles only, and the default's for so few rows; K of whole steps."""
    problem = first(layout, n=656, k=256, activation=activation, slots=10, bias=bias)
    run(problem, config_of(problem, 128, heights=1), DECODE, groups=(3,))
    run(problem, default_config(problem, 1536, 2048, 16, 128), DECODE, groups=(20,), unused=5)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("width, heights, fields", [
    (256, 3, dict(row_scale=RowScale.outputs)), pytest.param(192, 5, dict(row_scale=RowScale.outputs, bias=BF16, input=F16), marks=pytest.mark.full),
    (128, 3, dict(bias=F32)), pytest.param(256, 5, dict(row_scale=RowScale.outputs, output=BF16, bias=F32), marks=pytest.mark.full),
    (64, 3, dict(output=F16, input=F16, row_scale=RowScale.outputs))],
    ids=["f32", "f32 bias", "no factor", "bf16 bias", "f16"])
def test_second_gemm(width, heights, fields, layout):
    problem = second(layout, **fields)
    run(problem, config_of(problem, width, heights=heights), COUNTS, groups=(9,), unused=21)


@pytest.mark.parametrize("layout", [EKN, pytest.param(ENK, marks=pytest.mark.full)])
def test_second_gemm_of_few_rows(layout):
    problem = second(layout, n=328, k=256, row_scale=RowScale.outputs, bias=BF16)
    run(problem, default_config(problem, 2048, 768, 16, 128), DECODE, groups=(20,), unused=5)


@pytest.mark.few(1)
@pytest.mark.parametrize("shared, layout, heights, fields", [
    (1, ENK, 3, dict(activation=SILU, slots=9)), (2, ENK, 5, dict(activation=SILU, slots=10, bias=BF16, row_scale=RowScale.sums)),
    pytest.param(2, ENK, 5, dict(activation=NO_GATE, slots=3), marks=pytest.mark.full), (2, EKN, 3, dict(activation=SILU, slots=4, bias=F32)),
    pytest.param(1, EKN, 5, dict(activation=NO_GATE), marks=pytest.mark.full)])
def test_shared_experts_in_the_first_gemm(shared, layout, heights, fields):
    """Gates and up values in tensors of their own; no bias."""
    problem = first(layout, k=160, shared=shared, **fields)
    run(problem, config_of(problem, heights=heights), SHARED_COUNTS, groups=(11,))


@pytest.mark.parametrize("shared, layout, heights, fields", [
    pytest.param(1, ENK, 5, dict(row_scale=RowScale.outputs), marks=pytest.mark.full), (2, ENK, 3, dict(row_scale=RowScale.outputs, bias=BF16)),
    pytest.param(2, EKN, 3, dict(output=BF16), marks=pytest.mark.full)])
def test_shared_experts_in_the_second_gemm(shared, layout, heights, fields):
    """Columns of one down projection."""
    problem = second(layout, k=160, shared=shared, **fields)
    run(problem, config_of(problem, heights=heights), SHARED_COUNTS, groups=(11,), unused=9)


def test_shared_expert_alone():
    problem = GroupedGemmProblem(208, 136, BF16, BF16, ENK, activation=SILU, shared=1)
    run(problem, default_config(problem, 16384, 5120, 300, 1), [300], groups=(2, 7))


@pytest.mark.parametrize("problem", [
    first(ENK, n=150, k=37, activation=SILU, slots=3, bias=F32), first(EKN, n=150, k=37, activation=SILU, slots=8, shared=2),
    first(ENK, F32, F32, n=150, k=37, activation=OAI, slots=10, bias=F16),
    pytest.param(first(EKN, F16, F16, n=150, k=37, activation=OAI, bias=F32), marks=pytest.mark.full),
    first(ENK, n=149, k=37, activation=NO_GATE, row_scale=RowScale.sums),
    pytest.param(first(ENK, n=150, k=37, activation=act("gelu"), shared=1), marks=pytest.mark.full),
    second(ENK, n=149, k=37, row_scale=RowScale.outputs, bias=BF16, shared=2),
    pytest.param(second(EKN, BF16, n=149, k=37, row_scale=RowScale.outputs), marks=pytest.mark.full),
], ids=name)
@pytest.mark.few(2)
def test_generic_main_loop_of_odd_sizes(problem):
    run(problem, generic_config(problem, 549), COUNTS, groups=(11,), unused=7)


def test_a_load_that_overwrites_its_addresses():
    """Of K = 4 * 16 + 12 float32 the last elements are loaded to where their addresses lie."""
    problem = first(ENK, F32, F32, n=54, k=76)
    run(problem, generic_config(problem, 93), COUNTS, groups=(11,))
