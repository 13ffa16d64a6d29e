"""Into how many parts K is cut: where there are few tiles, and so that no core is idle that need not be."""
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_xe.plan.gemm.config import LEAST_PART, MOST_PARTS
from moe_xe.plan.gemm.heuristics import Family, choose_config, cpu_config, generic_config
from moe_xe.plan.gemm.splits import choose_splits, possible_splits
from moe_xe.plan.model.schedule import evenly, tiles
from moe_xe.plan.problem import Dtype, GroupedGemmProblem
from moe_xe.plan.rules import check_queue


def gemm(n=192, k=4096):
    return GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16)


CPU = cpu_config(gemm(), "avx2")      # tiles of 168 x 192


@pytest.mark.parametrize("n, rows, cores, splits", [
    (192, [1], 1, 1), (192, [1], 2, 2), (192, [1], 3, 8), (192, [1], 64, 8), (192, [1, 0, 1], 4, 2), (192, [200], 8, 4), (384, [1], 2, 1),
    (576, [1], 4, 4), (192, [0, 0], 4, 1)])
def test_the_fewest_parts_that_fill_the_cores(n, rows, cores, splits):
    """One tile on three cores: eight parts take three turns of an eighth, four parts two of a quarter, two parts one of a half."""
    assert choose_splits(gemm(n), CPU, rows, cores) == splits


@pytest.mark.parametrize("k, splits", [(2 * LEAST_PART - 1, 1), (2 * LEAST_PART, 2), (4 * LEAST_PART - 1, 2), (8 * LEAST_PART, 8)])
def test_parts_are_not_too_short(k, splits):
    assert choose_splits(gemm(k=k), CPU, [1], 8) == splits


@given(st.integers(1, 2000), st.integers(1, 5000), st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 200))
def test_what_is_possible_keeps_the_rules(n, k, rows, cores):
    problem = gemm(n, k)
    for config in (cpu_config(problem, "avx2"), generic_config(problem, sum(rows))):
        possible = possible_splits(problem, config, rows, cores)
        for splits in possible:
            check_queue(problem, replace(config, splits=splits), sum(rows), len(rows), cores)
        enough = len(list(tiles(rows, n, config))) >= cores
        assert not (possible and enough)
        assert possible or enough or k < 2 * LEAST_PART or 2 * config.most_records(problem, sum(rows), len(rows)) > MOST_PARTS


@given(st.integers(0, 1000), st.integers(1, 70))
def test_even_rows(total_rows, num_experts):
    rows = evenly(total_rows, num_experts)
    assert sum(rows) == total_rows and len(rows) == num_experts and max(rows) - min(rows) <= 1


@pytest.mark.parametrize("family", [Family.cpu, Family.generic])
def test_default(family):
    assert choose_config(gemm(), family, 1, 8, 16).splits > 1
    assert choose_config(gemm(8192), family, 64, 8, 16).splits == 1
