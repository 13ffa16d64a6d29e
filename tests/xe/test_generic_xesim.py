"""The generic main loop as BMG code: exact float32, and what 2D block messages cannot take."""
from __future__ import annotations

import pytest

from moe_xe.isa import kernels
from moe_xe.isa.listing import summarize
from moe_xe.plan.gemm.heuristics import generic_config
from moe_xe.plan.problem import FLOATS, Dtype, GroupedGemmProblem

from .case import EKN, ENK, missing, run

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype, bias", [(Dtype.bf16, Dtype.f32), (Dtype.f16, None), (Dtype.f32, Dtype.f16)])
@pytest.mark.parametrize("layout, gathered", [(ENK, False), (ENK, True), (EKN, False)])
def test_odd_sizes(layout, gathered, dtype, bias):
    problem = GroupedGemmProblem(149, 37, dtype, dtype, layout, bias=bias, gathered=gathered)
    run(problem, generic_config(problem, 549), groups=(1, 11))


@pytest.mark.few(1)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_spills(dtype, layout, device):
    problem = GroupedGemmProblem(2880, 2881, dtype, dtype, layout, bias=dtype, gathered=True)
    summary = summarize(kernels.build(problem, generic_config(problem, 8192), device), "grouped_gemm")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
