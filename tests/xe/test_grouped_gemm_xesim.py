"""The grouped GEMM's BMG machine code, executed by xesim and compared with fp32 sums of the same rounded inputs."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowsFormat

from .case import EKN, ENK, Case, config_of, default_config, missing, run

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


# K leaves a tail of 48, 16 and 32 bytes, N one of 8 columns: bias in its own type
@pytest.mark.parametrize("dtype, k, bias", [
    (Dtype.bf16, 600, Dtype.f32), pytest.param(Dtype.f16, 328, None, marks=pytest.mark.full), (Dtype.f32, 184, Dtype.bf16)])
@pytest.mark.parametrize("gathered", [False, True], ids=["rows", "gathered"])
@pytest.mark.parametrize("layout", [ENK, EKN])
def test_types_and_layouts(layout, gathered, dtype, k, bias):
    problem = GroupedGemmProblem(200, k, dtype, dtype, layout, bias=bias, gathered=gathered, tf32=dtype is Dtype.f32)
    run(problem, config_of(problem))


@pytest.mark.few(1)
@pytest.mark.parametrize("width, k, gathered", [(192, 512, True), (128, 96, False), (64, 32, True)])
@pytest.mark.parametrize("layout", [ENK, EKN])
def test_widths(layout, width, k, gathered):
    """fp32 outputs; K of whole steps, down to a single one; several columns of tiles."""
    problem = GroupedGemmProblem(328, k, Dtype.bf16, Dtype.f32, layout, gathered=gathered)
    run(problem, config_of(problem, width))


@pytest.mark.parametrize("layout, rows_format, bits", [
    (ENK, RowsFormat.ends, 64), *(pytest.param(EKN, *case, marks=pytest.mark.full) for case in ((RowsFormat.counts, 64), (RowsFormat.ends, 32)))])
def test_static_schedule_and_row_tables(layout, rows_format, bits):
    problem = GroupedGemmProblem(136, 64, Dtype.f16, Dtype.bf16, layout, rows_format=rows_format, rows_bits=bits, bias=Dtype.f16)
    run(problem, config_of(problem, 64, Schedule.static, heights=3))


@pytest.mark.parametrize("layout, gathered, bits", [
    (EKN, False, 64), *(pytest.param(ENK, *case, marks=pytest.mark.full) for case in ((False, 32), (True, 64)))])
def test_rows_of_several_ranks(layout, gathered, bits):
    """More experts than lanes; an expert without rows, a rank without rows."""
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, layout, rows_bits=bits, bias=Dtype.f32, gathered=gathered, ranks=3)
    run(problem, config_of(problem, 64, heights=3), [70, 0, 1, 0, 5, 33] * 3 + [0] * 18 + [0, 0, 9, 2, 64, 0] * 3, groups=(1, 7), unused=5)


@pytest.mark.parametrize("layout", [EKN, pytest.param(ENK, marks=pytest.mark.full)])
def test_the_batched_layout(layout):
    """Rows beyond the counts are not written; the last expert has all of its room."""
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, layout, rows_format=RowsFormat.batched)
    run(problem, config_of(problem, 64, heights=3), [70, 0, 1, 33, 71], unused=5 * 71 - 175)


@pytest.mark.few(2)
@pytest.mark.parametrize("width", [512, 256, 128])
@pytest.mark.parametrize("layout, gathered", [(ENK, False), pytest.param(ENK, True, marks=pytest.mark.full),
                                              pytest.param(EKN, False, marks=pytest.mark.full), (EKN, True)])
def test_decode(layout, gathered, width):
    """More experts than lanes, at most a few rows each; the default's 512 columns, and other parts of a tile for a sub-group."""
    problem = GroupedGemmProblem(328, 136, Dtype.bf16, Dtype.bf16, layout, gathered=gathered)
    config = default_config(problem, 5760, 2880, 16, 32)
    assert (config.heights, config.tile_width, config.sub_group_rows, config.sub_group_columns) == ((16,), 512, (16,), (64,))
    if width == 128:
        config = config_of(problem, width, heights=1)
    run(problem, replace(config, tile_width=width), [1, 0, 2, 0, 0, 5, 1, 0, 16, 0, 40, 3] * 3, groups=(3, 40))


@pytest.mark.parametrize("counts", [[0, 0, 0], [500, 900, 7], [40, -3, 2**31 - 1], [-2**31, 64, 64]])
@pytest.mark.parametrize("layout, gathered", [
    (ENK, True), *(pytest.param(EKN, gathered, marks=pytest.mark.full) for gathered in (False, True))])
def test_garbage_counts_touch_nothing_outside(layout, gathered, counts):
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, layout, gathered=gathered)
    config = config_of(problem, 64, heights=3)
    case = Case(problem, [20, 30, 50], total_rows=100)
    case.rows[:] = counts
    case.launch(config, 3)
    assert (case.d[:, problem.n:] == case.poison[:, problem.n:]).all()


@pytest.mark.parametrize("fields", [dict(ranks=3, rows_bits=64, bias=Dtype.f32), dict(rows_format=RowsFormat.batched)], ids=["ranks", "batched"])
def test_garbage_tables_touch_nothing_outside(fields):
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, EKN, **fields)
    case = Case(problem, [20, 30, 50] * problem.ranks, total_rows=300)
    case.rows[:, :3] = [40, -3, 2**31 - 1]
    case.launch(config_of(problem, 64, heights=3), 3)
    assert (case.d[:, problem.n:] == case.poison[:, problem.n:]).all()


@pytest.mark.parametrize("layout", [ENK, pytest.param(EKN, marks=pytest.mark.full)])
def test_garbage_indices_touch_nothing_outside(layout):
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, layout, gathered=True)
    case = Case(problem, [20, 30, 50])
    case.indices[::3] = [-1, 2**31 - 1] * 17
    case.launch(config_of(problem, 64, heights=3), 3)


@pytest.mark.parametrize("layout", [EKN, pytest.param(ENK, marks=pytest.mark.full)])
def test_garbage_targets_are_not_written(layout):
    problem = GroupedGemmProblem(136, 136, Dtype.bf16, Dtype.bf16, layout, scattered=True)
    case = Case(problem, [20, 30, 50])
    lost = case.indices[::3]
    case.want[lost[lost >= 0]] = np.nan
    case.indices[::3] = [-1, 2**31 - 1, -2**31, len(case.d)] * 8 + [-7, 1 << 24]
    case.launch(config_of(problem, 64, heights=3), 3)
    case.check()
