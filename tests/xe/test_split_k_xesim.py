"""Tiles whose K several work-groups share, as BMG code in xesim: right, and bitwise equal whatever the interleaving and the number of
work-groups."""
from __future__ import annotations

from dataclasses import replace

import pytest

from moe_xe.plan.gemm.heuristics import generic_config
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale
from moe_xe.plan.gemm.config import Schedule

from .case import EKN, ENK, Case, config_of, default_config, missing, name

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
COUNTS = [1, 0, 18, 3, 0]
FIRST = dict(gathered=True, slots=3, activation=Activation())
SECOND = dict(scattered=True, row_scale=RowScale.outputs)


def gemm(layout, n=208, k=1096, input=BF16, output=BF16, **fields) -> GroupedGemmProblem:
    """K of a different number of steps in the last part, and a tail."""
    return GroupedGemmProblem(n, k, input, output, layout, **fields)


def decode(problem: GroupedGemmProblem, splits: int):
    return replace(default_config(problem, 5760, 2880, 16, 32), splits=splits)


def check(problem: GroupedGemmProblem, config, groups=(1, 7, 40)) -> None:
    results = []
    for seed, num_groups in enumerate(groups):
        case = Case(problem, COUNTS, seed=11)
        case.launch(config, num_groups, seed)
        case.check()
        results.append(case.d)
    assert all((result == results[0]).all() for result in results)


@pytest.mark.parametrize("splits, problem", [
    (4, gemm(ENK, **FIRST)), (3, gemm(EKN, bias=BF16, **{**FIRST, "activation": OAI})), (2, gemm(ENK, output=F32, **SECOND)),
    *(pytest.param(splits, problem, marks=pytest.mark.full) for splits, problem in (
        (2, gemm(EKN)), (4, gemm(EKN, **FIRST)), (4, gemm(ENK, bias=F32, **{**FIRST, "activation": OAI})), (2, gemm(EKN, output=F32, bias=F16, **SECOND)),
        (4, gemm(ENK, k=1024, input=F16, output=F16, row_scale=RowScale.sums, **FIRST)), (8, gemm(EKN, k=2056, input=F16)),
        (2, gemm(ENK, k=516, input=F32, output=F32, tf32=True)), (3, gemm(EKN, k=780, input=F32, output=F32, tf32=True, gathered=True))))],
    ids=lambda value: name(value) if isinstance(value, GroupedGemmProblem) else str(value))
def test_decode(problem, splits):
    check(problem, decode(problem, splits))


@pytest.mark.parametrize("layout", [ENK, pytest.param(EKN, marks=pytest.mark.full)])
def test_several_heights(layout):
    """Some sub-groups have no part of a short tile; a static schedule."""
    problem = gemm(layout, n=328, k=600, bias=F32)
    check(problem, replace(config_of(problem, 64, heights=3), splits=2, schedule=Schedule.static))


@pytest.mark.parametrize("problem", [gemm(ENK, n=37, k=521, **SECOND), pytest.param(gemm(EKN, n=74, k=521, **FIRST), marks=pytest.mark.full)],
                         ids=["scattered", "gathered"])
def test_generic(problem):
    check(problem, replace(generic_config(problem, sum(COUNTS)), splits=2))


@pytest.mark.full
@pytest.mark.parametrize("layout", [ENK, EKN])
def test_every_number_of_work_groups(layout):
    problem = gemm(layout, k=512)
    check(problem, decode(problem, 2), groups=range(1, 41))
