"""Every sub-group shape that a default configuration can have, and default configurations of models, executed by xesim."""
from __future__ import annotations

from dataclasses import replace

import pytest

from moe_xe.isa import counts, kernels
from moe_xe.isa.listing import summarize
from moe_xe.plan.xe import rules as xe_rules
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale
from moe_xe.plan.xe.rules import check_xe_config

from .case import EKN, ENK, config_of, default_config, missing, run

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F32 = Dtype.bf16, Dtype.f32
COUNTS = [240, 0, 1, 120, 15, 70, 33]       # every height of a tile, whole and in part
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
KINDS = {
    "rows": dict(output=BF16),
    "gathered": dict(output=BF16, gathered=True, slots=3),
    "gathered, halves": dict(output=BF16, gathered=True, activation=Activation(), slots=8),
    "gathered, interleaved": dict(output=BF16, gathered=True, activation=OAI, slots=4, bias=BF16),
    "scattered": dict(output=F32, scattered=True, row_scale=RowScale.outputs),
}


def problem_of(kind: str, layout, n: int = 592, k: int = 136) -> GroupedGemmProblem:
    """N and K leave tails of every tile and step."""
    return GroupedGemmProblem(n, k, BF16, weights=layout, **KINDS[kind])


def covering(problem: GroupedGemmProblem) -> list[XeConfig]:
    """Between them every shape that is counted and possible; the first is what most other tests run."""
    wide = config_of(problem, 512)
    few_rows = replace(wide, heights=(16,), sub_group_rows=(8,), sub_group_columns=(32,))
    return [config_of(problem), wide] + [few_rows] * (problem.weights is EKN)


@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind not in ("rows", "gathered, interleaved"))) for kind in KINDS])
def test_every_shape(kind, layout):
    problem = problem_of(kind, layout)
    counted = {shape for shape in counts.SHAPES[layout] if xe_rules.sub_group_reason(problem, *shape) is None}
    assert {shape for config in covering(problem) for shape in zip(config.sub_group_rows, config.sub_group_columns)} == counted
    for config in covering(problem)[1:]:
        run(problem, config, COUNTS, groups=(9,), unused=21)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("kind, n, k, total_rows, num_experts", [
    ("gathered, halves", 1536, 2048, 1 << 13, 128), ("gathered, interleaved", 5760, 2880, 1 << 13, 32),
    pytest.param("scattered", 2880, 2880, 1 << 12, 32, marks=pytest.mark.full), pytest.param("rows", 4096, 14336, 1 << 14, 8, marks=pytest.mark.full)])
def test_defaults_of_models(kind, n, k, total_rows, num_experts, layout):
    problem = problem_of(kind, layout)
    run(problem, default_config(problem, n, k, total_rows, num_experts), COUNTS, groups=(7,))


@pytest.mark.few(1)
@pytest.mark.parametrize("distance", [15, pytest.param(8, marks=pytest.mark.full), 0])
@pytest.mark.parametrize("kind, layout", [("gathered, halves", ENK), ("gathered", EKN), pytest.param("rows", EKN, marks=pytest.mark.full)])
def test_prefetch_distances(kind, layout, distance):
    """K shorter and longer than what is prefetched."""
    for k in (136, 528):
        problem = problem_of(kind, layout, n=136, k=k)
        run(problem, replace(config_of(problem, 64, heights=3), prefetch_distance=distance), [40, 3], groups=(2,))


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("kind", ["rows", "gathered, halves"])
def test_half_the_registers(kind, layout):
    """No spills, and the same results."""
    problem = problem_of(kind, layout)
    config = XeConfig(heights=(32, 16), tile_width=128, raster_group=2, min_fill_eighths=7, schedule=Schedule.dynamic,
                      sub_group_rows=(16, 16), sub_group_columns=(32, 32), prefetch_distance=3, grf_size=128)
    check_xe_config(problem, config)
    summary = summarize(kernels.build(problem, config, "bmg"), "grouped_gemm")
    assert (summary.grf, summary.spill_bytes) == (128, 0)
    run(problem, config, COUNTS, groups=(9,))
