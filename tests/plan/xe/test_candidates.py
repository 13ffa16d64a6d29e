"""The choice by the cost model: legal, robust against skew, few kernels a shape, and configurations to measure."""
import random
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_xe.bench.workloads import MODELS, recorded_layers, routed_rows
from moe_xe.plan.formats import CHECKPOINTS
from moe_xe.plan.xe import candidates, rules as xe_rules
from moe_xe.plan.xe.candidates import best_xe_configs, check_xe_config, choose_xe_config, likely_loads
from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.model.cost import own_kernel, predict
from moe_xe.plan.model.devices import DeviceRecord, record_named
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, WeightLayout
from moe_xe.plan.model.schedule import simulate
from moe_xe.plan.xe.configs import enumerate_configs

B580 = record_named("b580")
DEVICES = [B580, record_named("max1100"), record_named("lunar-lake")]
ALL_BUCKETS = [1 << i for i in range(17)]


def gemm(n=5760, k=2880, layout=WeightLayout.enk, activation=None, gathered=False):
    return GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16, layout, activation=activation, gathered=gathered)


def predicted(problem, rows, config, device=B580):
    return predict(problem, rows, own_kernel(problem, config, device), device, launches=0)


problems = st.builds(gemm, st.integers(1, 100).map(lambda n: 64 * n), st.integers(1, 60).map(lambda k: 64 * k), st.sampled_from(WeightLayout),
                     st.sampled_from([None, Activation(), Activation(interleaved=True)]), st.booleans())


@settings(max_examples=25, deadline=None)
@given(problems, st.integers(1, 3000), st.sampled_from(DEVICES))
def test_what_is_enumerated_keeps_the_rules(problem, most_rows, device):
    configs, rejected = enumerate_configs(problem, device, most_rows)
    assert configs and len(set(configs)) == len(configs) and all(reject.reason for reject in rejected)
    for config in configs:
        check_xe_config(problem, config, device)
        assert xe_rules.cache_reason(config, device) is None
        assert config.heights[0] == 16 or config.heights[0] // 4 < most_rows     # none that would never be used
        for height, shape in zip(config.heights, zip(config.sub_group_rows, config.sub_group_columns)):
            assert xe_rules.shape_spills(problem, *shape, device) is None
            assert xe_rules.tile_spills(problem, height, config.tile_width, *shape) is None


@settings(max_examples=15, deadline=None)
@given(problems, st.integers(1, 4000), st.integers(1, 64), st.sampled_from(DEVICES), st.sampled_from(Schedule))
def test_what_is_chosen_keeps_the_rules(problem, total_rows, num_experts, device, schedule):
    config = choose_xe_config(problem, total_rows, num_experts, device, schedule)
    check_xe_config(problem, config, device)
    assert config.schedule is schedule and config.heights[-1] == 16 and xe_rules.cache_reason(config, device) is None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_codes_are_as_fast_as_they_are_small_and_with_many_rows_as_dense_weights(name):
    dense = gemm(1536, 2048, activation=Activation(), gathered=True)
    problem = replace(dense, quantization=CHECKPOINTS[name].quantization)

    def seconds(some, rows):
        config = choose_xe_config(some, sum(rows), len(rows), B580)
        return predicted(some, rows, config).seconds, config

    (few, _), (many, config) = seconds(problem, [1] * 128), seconds(problem, [512] * 128)
    assert seconds(dense, [1] * 128)[0] / few == pytest.approx(2 / problem.weight_bytes, rel=0.06)
    assert seconds(dense, [512] * 128)[0] / many >= 0.9
    assert (config.sub_group_rows[0], config.sub_group_columns[0]) == (64, 32)     # an operand serves four dpas


@given(st.integers(0, 10**5), st.integers(1, 300))
def test_loads_have_the_rows_that_they_should(total_rows, num_experts):
    loads = likely_loads(total_rows, num_experts)
    assert all(len(rows) == num_experts and sum(rows) == total_rows and min(rows) >= 0 for rows in loads)
    even, random_like, recorded = loads
    assert max(even) - min(even) <= 1
    assert num_experts < 4 or total_rows < 40 * num_experts or max(even) < max(random_like) < max(recorded)


def test_the_recorded_load_is_what_was_recorded():
    mean = [statistics.mean(part) for part in zip(*(sorted(rows, reverse=True) for rows in recorded_layers()))]
    total = sum(mean)
    sixteenths = [16 * sum(mean[i:i + 2]) / total for i in range(0, 32, 2)]
    assert candidates.RECORDED == pytest.approx(sixteenths, abs=0.015)


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_shape_needs_few_kernels(model, layout):
    """Of both GEMMs of the block, over every number of rows."""
    for index, (n, k) in enumerate(model.gemms()):
        problem = gemm(n, k, layout, Activation() if index == 0 else None, gathered=index == 0)
        chosen = {choose_xe_config(problem, rows, model.num_experts, B580) for rows in ALL_BUCKETS}
        assert len(chosen) <= 8


def test_rows_between_powers_of_two_share_the_next_ones_choice():
    for rows in (1, 3, 17, 100, 5000):
        bucket = next(bucket for bucket in ALL_BUCKETS if bucket >= rows)
        assert choose_xe_config(gemm(), rows, 32, B580) is choose_xe_config(gemm(), bucket, 32, B580)
    assert choose_xe_config(gemm(), 10**7, 32, B580) is choose_xe_config(gemm(), 10**6, 32, B580)


def test_tall_tiles_are_at_hand_where_one_expert_may_have_all_rows():
    """Of the mean's 2 and 16 rows an expert, the shortest tiles would do."""
    for rows in (64, 512):
        assert choose_xe_config(gemm(), rows, 32, B580).heights[0] >= min(rows, 128)
    assert choose_xe_config(gemm(), 16, 32, B580).heights == (16,)


def loads_of(model, tokens):
    """Random routing; and the recorded layers' proportions, in a random order of experts."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    yield routed_rows(model, tokens, generator)
    layer = sorted(random.choice(recorded_layers()))
    weights = torch.tensor([layer[e * len(layer) // model.num_experts] for e in range(model.num_experts)], dtype=torch.float64) + 1e-3
    picked = torch.multinomial(weights, tokens * model.top_k, replacement=True, generator=generator)
    yield torch.bincount(picked, minlength=model.num_experts).tolist()


@pytest.mark.parametrize("tokens", [4, 64, 512, 2048])
@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_nearly_as_good_as_if_the_rows_were_known(model, tokens):
    n, k = random.choice(model.gemms())
    problem = gemm(n, k, random.choice(list(WeightLayout)))
    for rows in loads_of(model, tokens):
        best, = best_xe_configs(problem, rows, B580, 1)
        chosen = choose_xe_config(problem, sum(rows), model.num_experts, B580)
        assert predicted(problem, rows, chosen).seconds <= 1.25 * predicted(problem, rows, best).seconds, (rows, chosen, best)


@pytest.mark.parametrize("n", [5760, 2880])
def test_the_recorded_layers(n):
    problem = gemm(n)
    for rows in recorded_layers()[::6]:
        chosen, (best,) = choose_xe_config(problem, sum(rows), len(rows), B580), best_xe_configs(problem, rows, B580, 1)
        assert simulate(rows, n, chosen, B580.xe_cores).efficiency >= 0.94
        assert predicted(problem, rows, chosen).seconds <= 1.05 * predicted(problem, rows, best).seconds


@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("n, k, experts", [(5760, 2880, 32), (1536, 2048, 128), (28672, 4096, 8)])
def test_decode_takes_wide_tiles_of_few_instructions(n, k, experts, layout):
    """A few rows: memory bounds every candidate, so that time says nothing; 16x64 issues the fewest instructions."""
    problem = gemm(n, k, layout)
    chosen = choose_xe_config(problem, 8, experts, B580)
    assert (chosen.heights, chosen.tile_width) == ((16,), 512) and (chosen.sub_group_rows, chosen.sub_group_columns) == ((16,), (64,))
    assert predicted(problem, (1,) * 8, chosen).bound_by == "memory"


@pytest.mark.parametrize("layout", WeightLayout)
def test_k_is_shared_out_where_there_are_few_tiles(layout):
    """Only where that is expected to be faster."""
    few, many = gemm(256, 4096, layout), gemm(28672, 4096, layout)
    chosen = choose_xe_config(few, 1, 8, B580)
    whole = min((predicted(few, [1], config).seconds for config in enumerate_configs(few, B580, 1)[0]))
    assert chosen.splits > 1 and predicted(few, [1], chosen).seconds < whole / candidates.ALIKE
    assert chosen in best_xe_configs(few, [1], B580, 4)
    assert choose_xe_config(many, 2, 8, B580).splits == 1 == choose_xe_config(few, 8 * 2048, 8, B580).splits


def test_many_rows_of_one_expert():
    """Of more rows than the choice knows of, there are more tiles."""
    assert choose_xe_config(gemm(64, 4096), 10**6, 1, B580).splits == 1


@settings(max_examples=8, deadline=None)
@given(problems, st.lists(st.integers(0, 500), min_size=1, max_size=12), st.integers(1, 8))
def test_configurations_to_measure(problem, rows, count):
    found = best_xe_configs(problem, rows, B580, count)
    assert 1 <= len(found) <= count and len(set(found)) == len(found)
    for config in found:
        check_xe_config(problem, config, B580)
    main_tiles = [candidates._main_tile(rows, config) for config in found]
    twins = [(tile, config.prefetch_distance) for tile, config in zip(main_tiles, found)]
    assert len(set(twins)) == len(twins) and all(main_tiles.count(tile) <= candidates.TWINS for tile in main_tiles)
    times = [predicted(problem, rows, config).seconds for config in found]
    alone, = best_xe_configs(problem, rows, B580, 1)
    assert times == sorted(times) and predicted(problem, rows, alone).seconds <= times[0] * 1.03


def test_there_are_enough_to_measure():
    assert len(best_xe_configs(gemm(), recorded_layers()[0], B580, 8)) == 8
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        best_xe_configs(gemm(), [1], B580, 0)


def test_a_device_without_an_architecture():
    cpu = DeviceRecord("a CPU", 2, {"bf16": 1.0}, 30, "-")
    for choose in (lambda: choose_xe_config(gemm(), 1, 1, cpu), lambda: best_xe_configs(gemm(), [1], cpu, 1)):
        with pytest.raises(ValueError, match="device must be an Xe GPU with an architecture, got a CPU"):
            choose()
