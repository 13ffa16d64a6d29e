"""What the rules refuse, and that what they let through compiles on the CPU device and computes what it should."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_xe
from moe_xe import runtime
from moe_xe.bench.numerics import agrees
from moe_xe.ops import launch
from moe_xe.ops.block.activation import apply_activation
from moe_xe.ops.launch import Call
from moe_xe.ops.submission import Submission
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm import heuristics
from moe_xe.plan.gemm.config import TILE_INPUTS
from moe_xe.plan.outer import heuristics as outer_heuristics
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.model.schedule import tiles
from moe_xe.plan.gemm.heuristics import Family
from moe_xe.plan.launch import Target, plan_launch, plan_outer
from moe_xe.plan.outer.config import Gathered, OuterOperands, OuterProblem
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, Operands, WeightLayout
from moe_xe.plan.rules import check_config, check_outer_config, check_outer_queue, check_queue, check_splits
from moe_xe.plan.trials import trial_configs

from .configs import ISAS, cpu_configs, generic_configs, outer_cpu_configs, outer_generic_configs
from .gemm.test_config import CPU, CPU_AMX, GENERIC, OUTER_AMX, OUTER_CPU, OUTER_GENERIC, OUTER_XE, XE

BF16, F32 = Dtype.bf16, Dtype.f32
USABLE_ISAS = [isa for isa in ISAS[ISAS.index(runtime.cpu_isa()):] if isa not in TILE_INPUTS]     # which not all problems here can have
PROBLEM, OUTER = GroupedGemmProblem(256, 128, BF16, BF16), OuterProblem(256, 128, BF16, BF16)
EKN, PAIRS = replace(PROBLEM, weights=WeightLayout.ekn), replace(PROBLEM, activation=Activation())


@pytest.mark.parametrize("problem, config, family, message", [
    (PROBLEM, XE, Family.cpu, "the cpu kernel computes this call and needs a CpuConfig; got XeConfig"),
    (PROBLEM, CPU, Family.generic, "needs a GenericConfig"), (PROBLEM, GENERIC, Family.xe, "needs a XeConfig"),
    (PROBLEM, replace(CPU, isa="avx512", micro_columns=32, k_block=64), Family.cpu, "this CPU has no avx512, its best is avx2"),
    (PAIRS, replace(CPU, micro_columns=8), Family.cpu, "micro_columns that are a multiple of 16"),
    (PAIRS, replace(CPU, tile_width=95), Family.cpu, "an even tile_width"),
    (PROBLEM, replace(CPU, unpacked_rows=8192), Family.cpu, "unpacked_rows take 262144 bytes of stack"),
    (EKN, replace(CPU, unpacked_rows=64, tile_width=1024), Family.cpu, "unpacked_rows take 526336 bytes of stack"),
    (PROBLEM, replace(CPU, heights=(65536,), tile_width=4096), Family.cpu, None),
    (replace(PROBLEM, k=4096), replace(CPU, heights=(65536,)), Family.cpu, "packed blocks take .* bytes of each work-group"),
    (PROBLEM, replace(GENERIC, sub_group_columns=(64, 40)), Family.generic, "sub_group_columns must be multiples of 16"),
    (PAIRS, replace(GENERIC, sub_group_columns=(16, 16)), Family.generic, "must be multiples of 32"),
    (PROBLEM, replace(GENERIC, heights=(80, 32)), Family.generic, "heights must be multiples of their sub_group_rows"),
    (PROBLEM, replace(GENERIC, tile_width=144), Family.generic, "tile_width must be a multiple of all sub_group_columns"),
    (PROBLEM, replace(GENERIC, sub_group_columns=(128, 64)), Family.generic, "need 256 sums a lane, at most 128"),
    (PROBLEM, replace(GENERIC, tile_width=2176), Family.generic, "1088 work-items in a work-group, at most 1024"),
    (PROBLEM, replace(XE, heights=(64,), sub_group_rows=(16,), sub_group_columns=(128,)), Family.xe, "registers")])
def test_rules_of_grouped_gemms(problem, config, family, message):
    if message is None:
        return check_config(problem, config, family, "avx2")
    with pytest.raises(ValueError, match=f"config.*: .*{message}"):
        check_config(problem, config, family, "avx2")


def test_what_amx_multiplies():
    fp16, outer_fp16 = (replace(config, isa="amx_fp16") for config in (CPU_AMX, OUTER_AMX))
    f16, outer_f16 = replace(PROBLEM, input=Dtype.f16), replace(OUTER, input=Dtype.f16)
    for best in ("amx", "amx_fp16"):
        check_config(PROBLEM, CPU_AMX, Family.cpu, best)
        check_outer_config(OUTER, OUTER_AMX, Family.cpu, best)
    check_config(f16, fp16, Family.cpu, "amx_fp16")
    check_outer_config(outer_f16, outer_fp16, Family.cpu, "amx_fp16")
    with pytest.raises(ValueError, match="this CPU has no amx_fp16, its best is amx"):
        check_config(f16, fp16, Family.cpu, "amx")
    with pytest.raises(ValueError, match="amx multiplies bf16 and i8, not f32"):
        check_config(replace(PROBLEM, input=F32), CPU_AMX, Family.cpu, "amx_fp16")
    with pytest.raises(ValueError, match="amx multiplies bf16 and i8, not f16"):
        check_outer_config(outer_f16, OUTER_AMX, Family.cpu, "amx_fp16")
    with pytest.raises(ValueError, match="amx_fp16 multiplies f16, not bf16"):
        check_outer_config(OUTER, outer_fp16, Family.cpu, "amx_fp16")
    with pytest.raises(ValueError, match="amx_fp16 multiplies dense weights, not e2m1"):
        check_config(replace(f16, quantization=Quantization(Codes.e2m1, ScaleType.e8m0, 1, 32)), fp16, Family.cpu, "amx_fp16")


@pytest.mark.parametrize("problem, config, family, message", [
    (OUTER, OUTER_XE, Family.cpu, "the cpu kernel computes this call and needs a OuterCpuConfig; got OuterXeConfig"),
    (OUTER, OUTER_CPU, Family.cpu, "this CPU has no avx512, its best is avx2"),
    (OUTER, replace(OUTER_CPU, isa="baseline", micro_rows=2, tile_rows=65536, tile_columns=4096), Family.cpu, "packed blocks take"),
    (OUTER, replace(OUTER_GENERIC, sub_group_columns=8), Family.generic, "sub_group_columns must be multiples of 16"),
    (OUTER, replace(OUTER_GENERIC, sub_group_rows=64, sub_group_columns=128, tile_columns=128), Family.generic, "need 512 sums a lane"),
    (OUTER, replace(OUTER_GENERIC, tile_rows=2048, tile_columns=128), Family.generic, "2048 work-items"),
    (OUTER, replace(OUTER_XE, sub_group_rows=8), Family.xe, "multiples of 16 columns of dpas' left operand and of 32"),
    (OUTER, replace(OUTER_XE, sub_group_columns=16), Family.xe, "multiples of 16 columns of dpas' left operand and of 32"),
    (replace(OUTER, gathered=Gathered.right), replace(OUTER_XE, sub_group_rows=16), Family.xe, "right and left of the product"),
    (OUTER, replace(OUTER_XE, sub_group_rows=64, sub_group_columns=64), Family.xe, "take 320 registers, at most 240"),
    (OUTER, replace(OUTER_XE, tile_rows=512, tile_columns=256), Family.xe, "64 sub-groups, an Xe core has 32"),
    (OUTER, replace(OUTER_XE, tile_rows=96, tile_columns=256), Family.xe, None),
    (OUTER, replace(OUTER_XE, tile_rows=160, tile_columns=64), Family.xe, None),
    (OUTER, replace(OUTER_XE, tile_rows=80, sub_group_rows=16, tile_columns=64), Family.xe, "prefetch: 80 columns cannot be shared out")])
def test_rules_of_gradients_of_weights(problem, config, family, message):
    if message is None:
        return check_outer_config(problem, config, family, "avx2")
    with pytest.raises(ValueError, match=f"config does not fit: .*{message}"):
        check_outer_config(problem, config, family, "avx2")


def test_rules_of_splits():
    check_splits(OUTER_CPU, True)
    check_splits(replace(OUTER_CPU, splits=1), False)
    with pytest.raises(ValueError, match="splits must be 1 where d is accumulated or its rows are not equally spaced; got OuterCpuConfig"):
        check_splits(OUTER_CPU, False)
    with pytest.raises(ValueError, match="splits must be at most 64"):
        check_splits(replace(OUTER_CPU, splits=65), True)


NARROW = replace(CPU, heights=(1,), tile_width=1, raster_group=1)


@pytest.mark.parametrize("n, change, rows, message", [
    (65536, dict(raster_group=65536), 1, "raster_group x columns of tiles must stay below 2.31, but there can be 4294967296"),
    (65536, dict(raster_group=32768), 1, "raster_group x columns of tiles .* 2147483648"),
    (65536, dict(raster_group=32767), 1, None),
    (65536, {}, 32768, "tiles must stay below 2.31, but there can be"), (65536, {}, 32000, None),
    (2**30 + 1, dict(tile_width=65536), 1, "N must be at most 1073741824, got 1073741825"),
    (96, dict(heights=(256, 16), tile_width=96), 2**31 - 1, None)], ids=str)
def test_numbers_of_a_queue(n, change, rows, message):
    """Whoever chose the configuration, and before anything is compiled."""
    problem, config = GroupedGemmProblem(n, 1, F32, F32), replace(NARROW, **change)
    arguments = problem, replace(operands_of(problem, rows), num_experts=4), Target(True, 3, False, isa="avx2", best_isa="avx2"), heuristics.Schedule.dynamic
    if message is None:
        check_queue(problem, config, rows, 4, 3)
        assert plan_launch(*arguments, config).config == config
        return
    with pytest.raises(ValueError, match=message):
        plan_launch(*arguments, config)
    with force_config(config), pytest.raises(ValueError, match=message):
        plan_launch(*arguments)


@pytest.mark.parametrize("n, k, change, rows, message", [
    (64, 1024, dict(splits=4), 1, None), (64, 1023, dict(splits=4), 1, "splits must leave at least 256 elements of K to each part, K is 1023"),
    (256, 512, dict(splits=2, tile_width=1), 1, None),
    (257, 512, dict(splits=2, tile_width=1), 1, "splits are for few tiles: tiles x splits must be at most 1024, but there can be 514 tiles"),
    (65536, 512, dict(splits=2, heights=(65536,), tile_width=256), 1, "sums of parts take")], ids=str)
def test_parts_of_k(n, k, change, rows, message):
    problem, config = GroupedGemmProblem(n, k, F32, F32), replace(NARROW, **{"tile_width": 64, **change})
    if message is None:
        return check_queue(problem, config, rows, 4, 3)
    with pytest.raises(ValueError, match=message):
        check_queue(problem, config, rows, 4, 3)


def test_parts_of_k_of_quantised_weights():
    problem = GroupedGemmProblem(64, 1024, BF16, BF16, quantization=Quantization(Codes.int4, ScaleType.f32, 1, 32))
    check_queue(problem, CPU, 1, 4, 3)
    with pytest.raises(ValueError, match="splits must be 1 for quantised weights"):
        check_queue(problem, replace(CPU, splits=2), 1, 4, 3)


@settings(max_examples=200, deadline=None)
@given(config=cpu_configs(), rows=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_there_are_no_more_tiles_than_the_list_has_room_for(config, rows):
    problem = GroupedGemmProblem(3 * config.tile_width - 1, 1, F32, F32)
    assert sum(1 for _ in tiles(rows, problem.n, config)) <= config.splits * config.most_records(problem, sum(rows), len(rows))


@pytest.mark.parametrize("p, q, change, experts, message", [
    (65536, 65536, {}, 1, "tiles must stay below 2.31, but there can be 4294967302"), (4096, 4096, {}, 200, "tiles must stay below"),
    (4096, 4096, {}, 100, None), (2**31, 8, {}, 1, "P must be at most"), (1, 1, {}, 2**30 + 1, "there must be at most 1073741824 experts"),
    (2**20, 1, dict(tile_rows=65536, splits=64), 64, "rows of parts must stay below 2.31")], ids=str)
def test_numbers_of_a_queue_of_gradients(p, q, change, experts, message):
    problem, config = OuterProblem(p, q, BF16, BF16), replace(OUTER_CPU, tile_rows=1, tile_columns=1, splits=1)
    arguments = problem, replace(config, **change), experts, 3
    if message is None:
        return check_outer_queue(*arguments)
    with pytest.raises(ValueError, match=message):
        check_outer_queue(*arguments)


def test_threads_whose_scratch_no_machine_has():
    config = replace(CPU, heights=(65536,), threads=65536)
    with pytest.raises(ValueError, match="packed blocks of all threads take .* bytes, at most 17179869184"):
        check_config(PROBLEM, config, Family.cpu, "avx2")
    check_config(PROBLEM, replace(config, threads=64), Family.cpu, "avx2")


def test_a_call_with_numbers_that_do_not_fit():
    """A configuration that wrote nothing, of those that are legal."""
    config = replace(heuristics.cpu_config(GroupedGemmProblem(65536, 1, F32, F32), USABLE_ISAS[0]), tile_width=1, raster_group=65536)
    a, w = torch.ones(2, 1), torch.ones(1, 65536, 1)
    with pytest.raises(ValueError, match="raster_group x columns of tiles must stay below 2.31, but there can be 4294967296"):
        moe_xe.grouped_gemm(a, w, torch.tensor([2]), config=config)
    assert (moe_xe.grouped_gemm(a, w, torch.tensor([2]), config=replace(config, tile_width=64)) == 1).all()


COUNTS = [5, 0, 1, 47, 2, 18]


def gemm_is_right(config, problem: GroupedGemmProblem) -> None:
    """A call of this problem, also a forced one of another family, with poison in its output."""
    dtype = {BF16: torch.bfloat16, F32: torch.float32}[problem.input]
    a, w = torch.randn(sum(COUNTS), problem.k, dtype=dtype), torch.randn(len(COUNTS), problem.n, problem.k, dtype=dtype)
    stored = w if problem.weights is WeightLayout.enk else w.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.full((len(a), problem.out_n), float("nan"), dtype=torch.float32)
    with force_config(config):
        with Submission(launch.queue_for(out.device), out.device) as submission:
            launch.launch(submission, Call(a, stored, torch.tensor(COUNTS, dtype=torch.int32), len(a), activation=problem.activation), out)
    sums = torch.cat([part.double() @ each.double().T for part, each in zip(a.split(COUNTS), w)])
    expected = sums if problem.activation is None else apply_activation(sums, problem.activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.square().mean().sqrt()))


def outer_is_right(config, problem: OuterProblem) -> None:
    left, right = (torch.randn(sum(COUNTS), columns, dtype=torch.bfloat16) for columns in (problem.p, problem.q))
    out = torch.full((len(COUNTS), problem.p, problem.q), float("nan"))
    with force_config(config):
        moe_xe.grouped_outer(left, right, torch.tensor(COUNTS), out=out)
    expected = torch.stack([x.double().T @ y.double() for x, y in zip(left.split(COUNTS), right.split(COUNTS))])
    assert agrees(out, expected, 4 * max(COUNTS))


SHAPES = [GroupedGemmProblem(102, 149, BF16, F32), GroupedGemmProblem(70, 64, F32, F32, WeightLayout.ekn),
          GroupedGemmProblem(84, 75, BF16, F32, WeightLayout.ekn, activation=Activation()),
          GroupedGemmProblem(84, 75, BF16, F32, activation=Activation(interleaved=True))]


@settings(settings.get_profile("compiling"))
@given(data=st.data(), problem=st.sampled_from(SHAPES))
def test_legal_cpu_configurations_are_right(data, problem):
    config = data.draw(cpu_configs(USABLE_ISAS, problem.pairs, splits=1))      # K is short
    check_config(problem, config, Family.cpu, runtime.cpu_isa())
    gemm_is_right(config, problem)


@settings(settings.get_profile("compiling"))
@given(data=st.data(), problem=st.sampled_from([SHAPES[0], SHAPES[3]]))
def test_legal_generic_configurations_are_right(data, problem):
    config = data.draw(generic_configs((32,) if problem.pairs else (16, 32), splits=1))
    check_config(problem, config, Family.generic)
    gemm_is_right(config, problem)


@settings(settings.get_profile("compiling"))
@given(outer_cpu_configs(USABLE_ISAS))
def test_legal_outer_cpu_configurations_are_right(config):
    problem = OuterProblem(45, 71, BF16, F32)
    check_outer_config(problem, config, Family.cpu, runtime.cpu_isa())
    outer_is_right(config, problem)


@settings(settings.get_profile("compiling"))
@given(outer_generic_configs())
def test_legal_outer_generic_configurations_are_right(config):
    problem = OuterProblem(45, 71, BF16, F32)
    check_outer_config(problem, config, Family.generic)
    outer_is_right(config, problem)


@pytest.mark.parametrize("problem, change", [
    pytest.param(SHAPES[2], dict(unpacked_rows=21, tile_width=766), marks=pytest.mark.full),
    pytest.param(SHAPES[0], dict(dot_rows=8, unpacked_rows=50), marks=pytest.mark.full),
    pytest.param(SHAPES[0], dict(micro_rows=1), marks=pytest.mark.full),
    pytest.param(SHAPES[0], dict(prefetch_columns=65536), marks=pytest.mark.full), (SHAPES[2], dict(heights=(8192,), threads=64))], ids=str)
def test_the_largest_cpu_configurations_run(problem, change):
    config = replace(heuristics.cpu_config(problem, USABLE_ISAS[0]), **change)
    check_config(problem, config, Family.cpu, runtime.cpu_isa())
    gemm_is_right(config, problem)


def test_most_splits_run():
    outer_is_right(replace(outer_heuristics.cpu_outer_config(USABLE_ISAS[0]), splits=64), OuterProblem(45, 71, BF16, F32))


CPU_TARGET = Target(True, 3, False, isa=USABLE_ISAS[0], best_isa=runtime.cpu_isa())
GPU_TARGETS = [Target(False, 20, True, record=record_named("b60")), Target(False, 20, False)]
LOADS = [[1, 0, 0, 1], [5, 6, 2, 0], [20, 3, 18, 0], [300, 20, 900, 60]]


def operands_of(problem: GroupedGemmProblem, rows: int) -> Operands:
    stride = problem.k if problem.weights is WeightLayout.enk else problem.n
    return Operands(1 << 20, 1 << 30, 1 << 40, rows, rows, 4, problem.k, stride, problem.n * problem.k, problem.out_n, rows)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40).map(lambda x: 64 * x), k=st.integers(1, 40).map(lambda x: 64 * x), rows=st.sampled_from(LOADS),
       layout=st.sampled_from(WeightLayout), act=st.sampled_from([None, Activation(), Activation(interleaved=True)]),
       target=st.sampled_from([CPU_TARGET, *GPU_TARGETS]))
def test_trials_are_legal(n, k, rows, layout, act, target):
    problem = GroupedGemmProblem(n, k, BF16, BF16, layout, activation=act)
    operands = operands_of(problem, sum(rows))
    plan = plan_launch(problem, operands, target, heuristics.Schedule.static)
    check_config(problem, plan.config, plan.family, target.best_isa)
    for config in trial_configs(plan, operands, rows, target):
        check_config(problem, config, plan.family, target.best_isa)
        assert type(config) is type(plan.config) and config.schedule is plan.config.schedule


@pytest.mark.parametrize("target", [CPU_TARGET, *GPU_TARGETS], ids=["cpu", "xe", "generic"])
def test_trials_share_few_tiles_k_out_or_not(target):
    """But not where there is room for more rows than counts say, and so for too many tiles."""
    problem, rows, target = GroupedGemmProblem(128, 4096, BF16, BF16), [1, 0, 0, 0], replace(target, cores=16)
    for total_rows in (1, 20000):
        operands = operands_of(problem, total_rows)
        plan = plan_launch(problem, operands_of(problem, 1), target, heuristics.Schedule.dynamic)
        trials = trial_configs(plan, operands, rows, target)
        assert total_rows > 1 or {config.splits > 1 for config in [plan.config, *trials]} == {False, True}
        for config in trials:
            check_queue(problem, config, total_rows, operands.num_experts, target.cores)


@settings(max_examples=60, deadline=None)
@given(p=st.integers(1, 40).map(lambda x: 64 * x), q=st.integers(1, 40).map(lambda x: 64 * x), rows=st.sampled_from(LOADS),
       gathered=st.sampled_from(Gathered), accumulate=st.booleans(), target=st.sampled_from([CPU_TARGET, *GPU_TARGETS]))
def test_trials_of_gradients_are_legal(p, q, rows, gathered, accumulate, target):
    problem = OuterProblem(p, q, BF16, BF16, gathered=gathered, accumulate=accumulate)
    total = sum(rows)
    operands = OuterOperands(1 << 20, 1 << 30, 1 << 40, total, total, total, 4, p, q, q, p * q)
    plan = plan_outer(problem, operands, target)
    check_outer_config(problem, plan.config, plan.family, target.best_isa)
    for config in trial_configs(plan, operands, rows, target):
        check_outer_config(problem, config, plan.family, target.best_isa)
        check_splits(config, not accumulate)
        assert type(config) is type(plan.config)


every_third = pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.full) for first in (1, 2))])


@pytest.mark.few(1)
@every_third
@pytest.mark.parametrize("rows", LOADS[1:3], ids=str)
def test_trials_on_the_cpu_device_are_right(rows, first):
    problem = GroupedGemmProblem(210, 300, BF16, F32, WeightLayout.ekn, activation=Activation())
    operands = operands_of(problem, sum(rows))
    trials = trial_configs(plan_launch(problem, operands, CPU_TARGET, heuristics.Schedule.dynamic), operands, rows, CPU_TARGET)
    assert trials
    for config in trials[first::3]:
        gemm_is_right(config, problem)


@every_third
def test_trials_of_gradients_on_the_cpu_device_are_right(first):
    problem, total = OuterProblem(45, 71, BF16, F32), sum(COUNTS)
    operands = OuterOperands(1 << 20, 1 << 30, 1 << 40, total, total, total, len(COUNTS), 45, 71, 71, 45 * 71)
    plan = plan_outer(problem, operands, CPU_TARGET)
    for config in trial_configs(plan, operands, COUNTS, CPU_TARGET)[first::3]:
        outer_is_right(config, problem)
