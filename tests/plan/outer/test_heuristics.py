"""The choices for the weights' gradient."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_xe.plan.gemm.heuristics import Family
from moe_xe.plan.outer.config import Gathered, OuterCpuConfig, OuterGenericConfig, OuterOperands, OuterProblem, OuterXeConfig
from moe_xe.plan.outer.heuristics import (MAX_PARTS_BYTES, MAX_SPLITS, choose_outer_config, choose_outer_family,
                                          outer_fits_block_messages, xe_tile)
from moe_xe.plan.problem import Dtype

BF16 = Dtype.bf16


def problem(p=1536, q=2048, **changes) -> OuterProblem:
    return OuterProblem(p, q, **{"input": BF16, "output": BF16, **changes})


def operands(of: OuterProblem, total_rows=8192, num_experts=32, **changes) -> OuterOperands:
    return replace(OuterOperands(1 << 20, 1 << 30, 1 << 40, total_rows, total_rows, total_rows, num_experts, of.p, of.q, of.q,
                                 of.p * of.q), **changes)


def test_families():
    of = problem()
    assert choose_outer_family(of, operands(of), is_cpu=True, has_dpas=False) is Family.cpu
    assert choose_outer_family(of, operands(of), is_cpu=False, has_dpas=True) is Family.xe
    assert choose_outer_family(of, operands(of), is_cpu=False, has_dpas=False) is Family.generic
    exact = problem(input=Dtype.f32)
    assert choose_outer_family(exact, operands(exact), is_cpu=False, has_dpas=True) is Family.generic


@pytest.mark.parametrize("gathered, changes, fits", [
    (Gathered.none, {}, True), (Gathered.left, {}, True), (Gathered.right, {}, True),
    (Gathered.none, dict(left=(1 << 20) + 32), False), (Gathered.right, dict(right=(1 << 30) + 2), False),
    (Gathered.none, dict(left_stride=1536 + 8), False), (Gathered.left, dict(left_stride=1536 + 8), True),    # of every second row
    (Gathered.none, dict(right_stride=2048 + 8), True), (Gathered.none, dict(right_stride=2048 + 4), False),
    (Gathered.none, dict(d_stride=2048 + 8), False), (Gathered.right, dict(d_stride=2048 + 8), True),
    (Gathered.right, dict(d=(1 << 40) + 8), False), (Gathered.none, dict(d_expert_stride=1536 * 2048 + 8), False),
    (Gathered.none, dict(left_stride=1 << 22), False), (Gathered.none, dict(right_rows=1 << 24), False)])
def test_what_block_messages_take(gathered, changes, fits):
    of = problem(gathered=gathered)
    assert outer_fits_block_messages(of, operands(of, **changes)) is fits


def test_columns_of_gathered_rows_come_by_sixteen():
    for gathered in (Gathered.left, Gathered.right):
        of = problem(1544, 2056, gathered=gathered)
        assert not outer_fits_block_messages(of, operands(of, left_stride=2048, right_stride=2112, d_stride=2112, d_expert_stride=1544 * 2112))


@pytest.mark.parametrize("p, q, tile", [(1536, 2048, (256, 256)), (2048, 768, (256, 256)), (2880, 2880, (256, 192)), (64, 2048, (64, 256))])
def test_tiles_on_xe(p, q, tile):
    assert xe_tile(p, q) == tile


@given(p=st.integers(1, 4000), q=st.integers(1, 4000))
def test_any_tile_on_xe_has_4_to_32_sub_groups(p, q):
    rows, columns = xe_tile(p, q)
    assert rows % 32 == columns % 64 == 0 and 4 <= rows // 32 * (columns // 64) <= 32


@given(p=st.integers(1, 4000), q=st.integers(1, 4000), experts=st.integers(1, 600), rows=st.integers(1, 100000),
       cores=st.integers(1, 200), family=st.sampled_from(list(Family)))
def test_splits_are_few_and_affordable(p, q, experts, rows, cores, family):
    of = problem(p, q)
    config = choose_outer_config(of, operands(of, rows, experts), family, cores, "avx2")
    tiles = experts * -(-p // config.tile_rows) * -(-q // config.tile_columns)
    assert 1 <= config.splits <= MAX_SPLITS
    if config.splits > 1:
        assert tiles < 4 * cores and experts * p * q * config.splits * 4 < MAX_PARTS_BYTES and rows // config.splits >= 256


def test_rows_are_shared_out_where_tiles_are_few():
    of = problem(512, 512)
    few = operands(of, num_experts=1)
    assert choose_outer_config(of, few, Family.xe, 20).splits == MAX_SPLITS
    assert choose_outer_config(problem(), operands(problem()), Family.xe, 20).splits == 1
    assert choose_outer_config(replace(of, accumulate=True), few, Family.xe, 20).splits == 1
    apart = operands(of, num_experts=2, d_expert_stride=2 * 512 * 512)
    assert choose_outer_config(of, apart, Family.xe, 20).splits == 1


def test_the_cpus_instructions():
    of = problem()
    for isa, columns in (("avx512_bf16", 32), ("avx2", 16), ("baseline", 8)):
        config = choose_outer_config(of, operands(of), Family.cpu, 2, isa)
        assert (config.isa, config.micro_columns) == (isa, columns)


@pytest.mark.parametrize("p, q, experts, cores, tile", [(1536, 2048, 16, 2, (336, 384)), (1536, 2048, 1, 2, (336, 384)),
                                                        (1536, 2048, 1, 64, (168, 192)), (64, 64, 1, 2, (168, 192))])
def test_tiles_on_the_cpu(p, q, experts, cores, tile):
    of = problem(p, q)
    config = choose_outer_config(of, operands(of, num_experts=experts), Family.cpu, cores, "avx2")
    assert (config.tile_rows, config.tile_columns) == tile


@pytest.mark.parametrize("family, kind", [(Family.cpu, OuterCpuConfig), (Family.xe, OuterXeConfig), (Family.generic, OuterGenericConfig)])
def test_every_family_has_its_kind(family, kind):
    assert isinstance(choose_outer_config(problem(), operands(problem()), family, 2, "avx2"), kind)
