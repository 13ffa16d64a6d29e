"""Who chooses a configuration: forced before given before chosen; and what is refused."""
from dataclasses import replace

import pytest

from moe_xe.plan.gemm import heuristics
from moe_xe.plan.outer import heuristics as outer_heuristics
from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.gemm.heuristics import Family
from moe_xe.plan.launch import Origin, Target, plan_launch, plan_outer
from moe_xe.plan.outer.config import OuterOperands, OuterProblem
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, Operands

from .gemm.test_config import CPU, GENERIC, OUTER_CPU, OUTER_GENERIC, OUTER_XE, XE

PROBLEM, OUTER = GroupedGemmProblem(256, 128, Dtype.bf16, Dtype.bf16), OuterProblem(256, 128, Dtype.bf16, Dtype.bf16)
OPERANDS = Operands(a=0x1000, w=0x2000, d=0x3000, total_rows=100, a_rows=100, num_experts=4, a_stride=128, w_stride=128,
                    w_expert_stride=256 * 128, d_stride=256, d_rows=100)
OUTER_OPERANDS = OuterOperands(0x1000, 0x2000, 0x3000, 100, 100, 100, 4, 256, 128, 128, 256 * 128)
CPU_DEVICE = Target(True, 3, False, isa="avx2", best_isa="avx512")
B60, OTHER_GPU = Target(False, 20, True, record=record_named("b60")), Target(False, 8, False)
OUTER_GIVEN = replace(OUTER_CPU, splits=1)


def gemm(target=CPU_DEVICE, config=None, operands=OPERANDS, schedule=Schedule.dynamic):
    return plan_launch(PROBLEM, operands, target, schedule, config)


def outer(target=CPU_DEVICE, config=None, problem=OUTER, operands=OUTER_OPERANDS):
    return plan_outer(problem, operands, target, config)


def test_forced_before_given_before_chosen():
    other = replace(CPU, raster_group=1)
    assert (gemm(config=CPU).config, gemm(config=CPU).origin) == (CPU, Origin.given)
    chosen = gemm()
    assert (chosen.config, chosen.origin) == (replace(heuristics.cpu_config(PROBLEM, "avx2"), tile_width=64), Origin.chosen)      # few tiles
    with force_config(other, OUTER_XE):
        assert (gemm(config=CPU).config, gemm(config=CPU).origin) == (other, Origin.forced)
        assert gemm(config=GENERIC) == gemm() and gemm().origin is Origin.forced      # whatever is given
        assert (outer(config=OUTER_GIVEN).config, outer().origin) == (OUTER_XE, Origin.forced)
    assert (outer(config=OUTER_GIVEN).config, outer(config=OUTER_GIVEN).origin) == (OUTER_GIVEN, Origin.given)
    assert (outer().config.isa, outer().origin) == ("avx2", Origin.chosen)


def test_what_a_launch_needs():
    given = replace(CPU, threads=7)
    plan = gemm(config=given)
    assert (plan.num_groups, plan.group_size, plan.group_scratch_bytes) == (7, 1, given.scratch_bytes(PROBLEM))
    # 100 rows of 3 experts are at most 4 row tiles of 32 rows and 3 shorter ones, of two columns each
    assert plan.scratch_bytes(replace(OPERANDS, total_rows=100, num_experts=3)) == 7 * given.scratch_bytes(PROBLEM) + 16 * (3 + 2 * (100 // 32 + 3))
    assert (gemm().num_groups, gemm(OTHER_GPU).num_groups, gemm(OTHER_GPU).family) == (3, 8, Family.generic)
    assert gemm(B60).group_size == gemm(B60).config.work_group_size
    assert gemm() is gemm()


def test_another_configuration_of_the_same_launch():
    plan = gemm()
    tuned = plan.with_config(replace(plan.config, threads=2), Origin.tuned, 3)
    assert tuned == replace(plan, config=replace(plan.config, threads=2), num_groups=2, origin=Origin.tuned)


def test_a_given_configuration_has_its_own_schedule():
    assert gemm(schedule=Schedule.static).config.schedule is Schedule.static
    assert gemm(schedule=Schedule.static, config=CPU).config.schedule is Schedule.dynamic


@pytest.mark.parametrize("target, config, message", [
    (CPU_DEVICE, XE, "the cpu kernel computes this call and needs a CpuConfig"), (CPU_DEVICE, GENERIC, "needs a CpuConfig"),
    (B60, CPU, "the xe kernel computes this call and needs a XeConfig"), (OTHER_GPU, XE, "the generic kernel computes this call"),
    (CPU_DEVICE, replace(CPU, isa="avx512_bf16", micro_columns=32, k_block=64), "this CPU has no avx512_bf16, its best is avx512")])
def test_configurations_that_do_not_fit(target, config, message):
    with pytest.raises(ValueError, match=message):
        gemm(target, config)


def test_a_slower_isa_of_the_cpu_may_be_given():
    for isa in ("avx512", "avx2", "baseline"):
        assert gemm(config=heuristics.cpu_config(PROBLEM, isa)).config.isa == isa


def test_operands_that_block_messages_cannot_take():
    fits = gemm(B60).config
    assert gemm(B60, fits).config is fits
    with pytest.raises(ValueError, match="the generic kernel computes this call and needs a GenericConfig; got XeConfig"):
        gemm(B60, fits, replace(OPERANDS, a=0x1010))


@pytest.mark.parametrize("target, config, message", [
    (CPU_DEVICE, OUTER_XE, "the cpu kernel computes this call and needs a OuterCpuConfig"), (B60, OUTER_GENERIC, "needs a OuterXeConfig"),
    (CPU_DEVICE, replace(outer_heuristics.cpu_outer_config("avx512_bf16")), "this CPU has no avx512_bf16")])
def test_configurations_that_do_not_fit_the_gradient(target, config, message):
    with pytest.raises(ValueError, match=message):
        outer(target, config)


@pytest.mark.parametrize("problem, operands", [(replace(OUTER, accumulate=True), OUTER_OPERANDS),
                                               (OUTER, replace(OUTER_OPERANDS, d_expert_stride=2 * 256 * 128))])
def test_parts_of_what_cannot_be_split(problem, operands):
    assert outer(config=OUTER_CPU).config.splits == 2
    assert outer(problem=problem, operands=operands, config=OUTER_GIVEN).config is OUTER_GIVEN
    with pytest.raises(ValueError, match="splits must be 1 where d is accumulated or its rows are not equally spaced"):
        outer(problem=problem, operands=operands, config=OUTER_CPU)
    with pytest.raises(ValueError, match="splits must be 1"), force_config(OUTER_CPU):
        outer(problem=problem, operands=operands)
