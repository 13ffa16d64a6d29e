"""Products of int8 codes: the BMG machine code, executed by xesim, against the numbers that the codes stand for."""
from __future__ import annotations

from dataclasses import replace

import pytest

from moe_xe.isa import kernels
from moe_xe.isa.listing import summarize
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm.config import GenericConfig, Schedule, XeConfig
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

from .case import Case, config_of, missing, run
from .quantised import COUNTS, KINDS

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

F32 = Dtype.f32
N, K = 204, 336              # tails of tiles and of a step of 64


def problem_of(kind: str, n: int = N, k: int = K, scales=ScaleType.f32, rows: int = 1, **more) -> GroupedGemmProblem:
    return GroupedGemmProblem(n, k, Dtype.i8, F32, quantization=Quantization(Codes.int8, scales, rows, k, **more), **KINDS[kind])


@pytest.mark.parametrize("kind, options", [
    ("gathered, interleaved, bias", dict(n=208, scales=ScaleType.f16)), ("scattered", dict(rows=3, global_scales=True)),
    *(pytest.param(kind, dict(n=208 if "," in kind else N), marks=pytest.mark.full) for kind in KINDS)])
def test_fusions(kind, options):
    problem = problem_of(kind, **options)
    run(problem, config_of(problem, heights=3), COUNTS, groups=(1, 7))


@pytest.mark.parametrize("k", [64, *(pytest.param(k, marks=pytest.mark.full) for k in (80, 256, 1040))])
def test_short_and_long_k(k):
    problem = problem_of("gathered", k=k)
    run(problem, config_of(problem, heights=2), [33, 2], groups=(2,))


def test_the_largest_sums():
    """All products are 127 * -128: int32 holds them."""
    case = Case(replace(problem_of("rows, bias", n=64, k=2048), bias=None), [20])
    case.a[:], case.w[:] = 127, 0x80
    case.want[:] = -127 * 128 * 2048 * case.a_scales.astype("f8")[:, None] * case.quantised.scales[0, :, 0]
    case.launch(config_of(case.problem, heights=2), 1)
    case.check()


def test_generic():
    problem = problem_of("gathered", n=37, k=70)
    run(problem, GenericConfig((16,), 32, 8, 7, Schedule.dynamic, (4,), (16,)), [5, 0, 17], groups=(2,))


@pytest.mark.few(1)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("kind", ["gathered, halves", "gathered, interleaved, bias", "scattered"])
def test_no_spills(kind, device):
    problem = problem_of(kind, 5760, 2880)
    summary = summarize(kernels.build(problem, kernels.default_config(problem), device), "grouped_gemm")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    if device == "bmg":
        assert kernels.prefill_loop(summary.loops).other_per_dpas <= 0.65
