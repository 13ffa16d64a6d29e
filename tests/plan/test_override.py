"""Configurations that are forced upon every launch."""
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_xe.plan.gemm.config import CpuConfig, TileConfig
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.config import OuterConfig
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.override import force_config, forced_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

PROBLEM = GroupedGemmProblem(64, 64, Dtype.bf16, Dtype.bf16)
FIRST, SECOND, OUTER, OTHER_OUTER = cpu_config(PROBLEM, "avx2"), cpu_config(PROBLEM, "baseline"), cpu_outer_config("avx2"), cpu_outer_config("baseline")


def forced():
    return forced_config(TileConfig), forced_config(OuterConfig)


def test_inside_the_block_only():
    assert forced() == (None, None)
    with force_config(FIRST):
        assert forced() == (FIRST, None)
        assert forced_config(CpuConfig) is FIRST
    assert forced() == (None, None)


def test_both_kinds_and_the_innermost_of_each():
    with force_config(FIRST, OUTER):
        assert forced() == (FIRST, OUTER)
        with force_config(OTHER_OUTER):
            assert forced() == (FIRST, OTHER_OUTER)
            with force_config(SECOND):
                assert forced() == (SECOND, OTHER_OUTER)
            with force_config():
                assert forced() == (FIRST, OTHER_OUTER)
        assert forced() == (FIRST, OUTER)


def test_an_error_ends_it():
    with pytest.raises(KeyError), force_config(FIRST):
        raise KeyError
    assert forced() == (None, None)


def test_other_threads_are_not_forced():
    with force_config(FIRST, OUTER), ThreadPoolExecutor(1) as pool:
        assert pool.submit(forced).result() == (None, None)
