"""The choice by the cost model: rules with reasons, legal configurations, and what it prefers to today's choice."""
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_xe.bench.workloads import recorded_layers
from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.plan import candidates
from moe_xe.plan.candidates import choose_xe_config, enumerate_configs, expected_rows
from moe_xe.plan.config import Schedule
from moe_xe.plan.cost_model import own_kernel, predict
from moe_xe.plan.devices import DeviceRecord, record_named
from moe_xe.plan.heuristics import xe_config
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, WeightLayout
from moe_xe.plan.schedule import simulate

B60 = record_named("b60")
DEVICES = [B60, record_named("max1100"), record_named("lunar-lake")]


def gemm(n=5760, k=2880, layout=WeightLayout.enk, activation=None, gathered=False):
    return GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16, layout, activation=activation, gathered=gathered)


def seconds(problem, rows, config, device):
    return predict(problem, rows, own_kernel(problem, config, device), device).seconds


@pytest.mark.parametrize("shape, reason", [((64, 64), "registers: sums, operands"), ((64, 32), "spills: not among"), ((32, 64), None),
                                           ((16, 8), None)])
def test_why_a_sub_group_is_out(shape, reason):
    found = candidates.sub_group_reason(gemm(), *shape, B60)
    assert found is None if reason is None else found.startswith(reason)


def test_pairs_need_both_of_their_columns():
    assert candidates.sub_group_reason(gemm(activation=Activation()), 16, 8, B60).startswith("pairs")
    assert candidates.sub_group_reason(gemm(activation=Activation()), 16, 16, B60) is None


@pytest.mark.parametrize("tile, reason", [((256, 256, 32, 64), None), ((512, 256, 32, 64), "threads: 64 sub-groups, an Xe core has 32"),
                                          ((256, 192, 32, 128), "sub-groups: do not divide"), ((256, 64, 128, 32), "prefetch: more than 32 rows"),
                                          ((48, 256, 16, 64), "prefetch: the columns' lines")])
def test_why_a_tile_is_out(tile, reason):
    found = candidates.tile_reason(gemm(), *tile, B60)
    assert found is None if reason is None else found.startswith(reason)


def test_gathered_tokens_leave_no_registers_for_a_second_message():
    assert candidates.tile_reason(gemm(gathered=True), 32, 256, 32, 64, B60).startswith("spills")
    assert candidates.tile_reason(gemm(), 32, 256, 32, 64, B60) is None
    assert candidates.tile_reason(gemm(gathered=True), 64, 256, 32, 64, B60) is None


def test_why_a_width_or_a_configuration_is_out():
    assert candidates.width_reason(gemm(n=64), 64) is None and candidates.width_reason(gemm(n=64), 128).startswith("tail: pads N = 64 to 128")
    config = xe_config(gemm(), 10**4)
    assert candidates.config_reason(config, B60) is None
    assert candidates.config_reason(replace(config, prefetch_distance=15), B60).startswith("L1: ")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(1, 3000), st.sampled_from(WeightLayout), st.sampled_from([None, Activation()]),
       st.sampled_from(DEVICES))
def test_what_is_left_keeps_the_rules(columns, most_rows, layout, activation, device):
    problem = gemm(n=64 * columns, layout=layout, activation=activation)
    configs, rejected = enumerate_configs(problem, device, most_rows)
    assert configs and all(reject.reason for reject in rejected)
    for config in configs:
        assert max(config.sub_groups) <= 32 and candidates.config_reason(config, device) is None
        assert config.heights[0] == 16 or config.heights[0] // 2 < most_rows     # none that would never be used
        for height, rows, width in zip(config.heights, config.sub_group_rows, config.sub_group_columns):
            assert candidates.tile_reason(problem, height, config.tile_width, rows, width, device) is None


@pytest.mark.skipif(bool(spirv.missing() or ocloc.missing()), reason=spirv.missing() or ocloc.missing() or "-")
@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("activation", [None, Activation(), Activation(interleaved=True)], ids=["plain", "halves", "interleaved"])
def test_what_is_chosen_compiles_without_spills(layout, activation):
    problem = gemm(activation=activation, layout=layout, gathered=True)
    for config in {choose_xe_config(problem, rows, 32, B60) for rows in (1, 20, 300)}:
        assert summarize(kernels.build(problem, config, "bmg"), "grouped_gemm").spill_bytes == 0, config


@pytest.mark.parametrize("mean, experts, rows", [(4, 3, (4, 4, 4)), (3.6, 2, (4, 4)), (1 / 16, 128, (1,) * 8), (0.001, 8, (1,))])
def test_rows_of_which_only_the_mean_is_known(mean, experts, rows):
    assert expected_rows(mean, experts) == rows


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("layout", WeightLayout)
def test_never_slower_than_todays_choice_by_the_models_own_measure(device, layout):
    for n, k, experts, mean in ((5760, 2880, 32, 250), (1536, 2048, 128, 4), (2048, 768, 128, 64), (1536, 2048, 128, 1 / 16)):
        problem, rows = gemm(n, k, layout), expected_rows(mean, experts)
        chosen = choose_xe_config(problem, mean, experts, device)
        assert seconds(problem, rows, chosen, device) <= seconds(problem, rows, xe_config(problem, sum(rows)), device) * candidates.ALIKE


@pytest.mark.parametrize("n", [5760, 2880])
def test_the_recorded_layers(n):
    """On rows that were recorded, the choice fills the cores as today's does, and the model expects it to be no slower."""
    for rows in recorded_layers()[::6]:
        problem = gemm(n)
        today, chosen = xe_config(problem, sum(rows)), choose_xe_config(problem, rows, len(rows), B60)
        assert simulate(rows, n, chosen, B60.xe_cores).efficiency >= 0.9
        assert seconds(problem, rows, chosen, B60) <= seconds(problem, rows, today, B60) * candidates.ALIKE


@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("n, k, experts", [(5760, 2880, 32), (1536, 2048, 128), (28672, 4096, 8)])
def test_decode_takes_wide_tiles_of_few_instructions(n, k, experts, layout):
    """One row an expert: memory bounds every candidate, so that time says nothing; 16x64 issues less than half as much as today's 16x8."""
    problem, rows = gemm(n, k, layout), (1,) * experts
    chosen = choose_xe_config(problem, 1, experts, B60)
    assert chosen.heights == (16,) and chosen.tile_width >= 256 and chosen.sub_group_columns[0] >= 32
    today = xe_config(problem, 16)
    now, then = (predict(problem, rows, own_kernel(problem, config, B60), B60) for config in (today, chosen))
    assert now.bound_by == then.bound_by == "memory" and then.seconds == pytest.approx(now.seconds, rel=0.02)
    assert then.parts["issue"] < 0.5 * now.parts["issue"]


def test_equal_questions_share_an_answer_and_the_schedule_is_kept():
    first = choose_xe_config(gemm(), 100, 8, B60, Schedule.static)
    assert first.schedule is Schedule.static and choose_xe_config(gemm(), 100, 8, B60, Schedule.static) is first


def test_a_device_without_an_architecture():
    with pytest.raises(ValueError, match="device must be an Xe GPU with an architecture, got a CPU"):
        choose_xe_config(gemm(), 1, 1, DeviceRecord("a CPU", 2, {"bf16": 1.0}, 30, "-"))
