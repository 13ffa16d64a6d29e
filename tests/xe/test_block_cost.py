"""The small launches' instructions in plan/block/cost.py against those that xesim executes."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_xe.jit.quantize_rows_source import quantize_rows_source
from moe_xe.jit.token_sort_source import combine_source, sort_source
from moe_xe.ops.checks import DTYPES
from moe_xe.plan.block.activate import QuantizeRowsProblem, activate_groups
from moe_xe.plan.block.cost import combine_instructions, quantize_rows_instructions, route_instructions, sort_instructions
from moe_xe.plan.block.routing import RoutingProblem
from moe_xe.plan.block.token_sort import LANE_BYTES, CombineProblem, combine_groups, sort_groups
from moe_xe.plan.problem import Dtype

from ..ops.routing.test_token_sort import BF16, F32, make_routing, make_rows
from .case import missing
from .test_route_xesim import routed
from .test_token_sort_xesim import build, ids, rows, sort_problem

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


def executed(source, groups: tuple[int, int], arguments: list) -> int:
    from xesim import Kernel
    return Kernel(build(source), source.name).launch(groups[0] * groups[1], groups[1], arguments).total


@pytest.mark.few(1)
@pytest.mark.parametrize("num_experts, top_k", [(8, 2), (64, 6), (128, 8), (256, 8)])
def test_route(num_experts, top_k):
    logits = np.random.default_rng(0).standard_normal((5, num_experts)).astype("f4")
    stats = routed(RoutingProblem(num_experts, top_k, Dtype.bf16, renormalize=True), logits, None, 0, seed=0)[2]
    assert route_instructions(num_experts, top_k) == pytest.approx(stats.total / 5, rel=0.15)


@pytest.mark.few(2)
@pytest.mark.parametrize("num_tokens, num_experts, top_k", [(1, 64, 8), (128, 8, 2), (512, 64, 6), (2048, 32, 4)])
def test_sort(num_tokens, num_experts, top_k):
    routing = make_routing((top_k, 0, torch.int32, BF16, None, False), num_tokens, num_experts, dropped=0.0, distinct=True)
    outputs = [np.zeros(size, kind) for size, kind in ((num_experts, "i4"), (num_tokens * top_k, "i4"), (num_tokens * top_k, "f4"), (8, "i4"))]
    total = executed(sort_source(sort_problem(routing), is_cpu=False), sort_groups(num_tokens, num_experts, is_cpu=False, cores=20), [
        *ids(routing), *rows(routing.topk_weights), *rows(None), np.float32(1), *outputs, np.int32(8), None, np.int64(0), np.int64(0),
        np.int32(num_tokens), np.int32(num_experts)])
    assert num_experts * sort_instructions(num_tokens) == pytest.approx(total, rel=0.25)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("hidden_size, top_k", [(2048, 8), (2880, 4), (4096, 2)])
def test_combine(hidden_size, top_k, dtype):
    routing = make_routing((top_k, 0, torch.int32, None, None, False), 4, 128, dropped=0.0)
    y, out = make_rows(routing, hidden_size, dtype, "cpu"), torch.zeros(4, hidden_size, dtype=BF16)
    columns = LANE_BYTES // DTYPES[dtype].size
    problem = CombineProblem(hidden_size, DTYPES[dtype], Dtype.bf16, top_k, columns=columns, stored=columns)
    total = executed(combine_source(problem, isa=None), combine_groups(problem, 4, is_cpu=False, cores=20),
                     [*rows(y), *ids(routing), *rows(out), np.int32(4), np.int32(128)])
    assert combine_instructions(hidden_size, top_k, DTYPES[dtype]) == pytest.approx(total / 4, rel=0.15)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [768, 2048, 2880, 7168])
def test_quantize_rows(size):
    problem = QuantizeRowsProblem(size, Dtype.bf16, 8)
    total = executed(quantize_rows_source(problem, isa=None), activate_groups(problem, 2, is_cpu=False, cores=20), [
        np.zeros((2, size), "u2"), np.int64(size), np.zeros((2, size), "i1"), np.int64(size), np.zeros(2, "f4"), np.int64(2)])
    assert quantize_rows_instructions(size) == pytest.approx(total / 2, rel=0.15)
