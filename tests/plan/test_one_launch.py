"""Which blocks are one launch, and how large it is."""
from __future__ import annotations

from dataclasses import replace

import pytest

from moe_xe.plan.block.one_launch import MOST_PAIRS, few_pairs, plan_one_launch
from moe_xe.plan.block.token_sort import CombineProblem, SortProblem
from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.gemm.heuristics import Family, cpu_config, generic_config
from moe_xe.plan.launch import LaunchPlan
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, RowScale

BF16, F32 = Dtype.bf16, Dtype.f32
GATE_UP = GroupedGemmProblem(1536, 2048, BF16, BF16, gathered=True, slots=8, activation=Activation())
DOWN = GroupedGemmProblem(2048, 768, BF16, F32, scattered=True, row_scale=RowScale.outputs)


def launch_plan(problem: GroupedGemmProblem, config, family: Family, groups: int = 20) -> LaunchPlan:
    return LaunchPlan(problem, config, family, groups, config.work_group_size, 0)


def generic(problem: GroupedGemmProblem, rows: int = 8, groups: int = 20) -> LaunchPlan:
    return launch_plan(problem, generic_config(problem, rows), Family.generic, groups)


def one_launch(first: LaunchPlan, second: LaunchPlan, tokens: int = 1, top_k: int = 8, columns: int = 4):
    return plan_one_launch(first, second, SortProblem(top_k), CombineProblem(2048, F32, BF16, top_k, columns=columns), tokens, 128)


def test_the_number_of_pairs_decides():
    assert MOST_PAIRS & (MOST_PAIRS - 1) == 0, "a power of two: keys of pairs"
    for tokens, top_k, one in ((MOST_PAIRS // 8, 8, True), (MOST_PAIRS // 8 + 1, 8, False), (MOST_PAIRS, 1, True), (MOST_PAIRS + 1, 1, False)):
        assert few_pairs(tokens, top_k) is one
        assert (one_launch(generic(GATE_UP), generic(DOWN), tokens, top_k) is not None) is one


def test_both_gemms_share_the_work_groups():
    """As many lanes as the larger one wants, as many work-groups as both have scratch for."""
    block = one_launch(generic(GATE_UP, groups=20), generic(DOWN, rows=400, groups=12))
    assert block.gate_up.num_groups == block.down.num_groups == 12
    assert block.group_size == max(block.gate_up.group_size, block.down.group_size)


@pytest.mark.parametrize("columns", [1, 4])
def test_all_columns_have_a_lane(columns):
    block = one_launch(generic(GATE_UP), generic(DOWN), columns=columns)
    assert (block.row_groups - 1) * block.group_size * columns < 2048 <= block.row_groups * block.group_size * columns


def test_what_one_kernel_cannot_be():
    first, second = generic(GATE_UP), generic(DOWN)
    static = launch_plan(DOWN, replace(second.config, schedule=Schedule.static), Family.generic)
    assert one_launch(first, static) is None
    cpu = [launch_plan(problem, cpu_config(problem, isa), Family.cpu, 2) for problem, isa in ((GATE_UP, "avx2"), (DOWN, "avx2"), (DOWN, "avx512"))]
    assert one_launch(first, cpu[1]) is None and one_launch(cpu[0], cpu[2]) is None and one_launch(cpu[0], cpu[1]) is not None
