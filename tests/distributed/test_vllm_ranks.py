"""vLLM's expert parallelism around its adapter: all ranks' tokens are gathered, each computes its experts' part, and parts are summed."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_xe.integrations.vllm import XpuFusedMoe
from tests.distributed.processes import ranks
from tests.ops.block.case import HIDDEN, INTERMEDIATE

EXPERTS, TOP_K, TOKENS, RANKS = 3, 3, 5, 4      # experts and tokens of a rank


def make_experts(w13, b13, w2, b2, num_experts: int, **options) -> XpuFusedMoe:
    return XpuFusedMoe(w13, None, b13, w2, None, b2, TOP_K, "silu", num_experts, **options)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.new_empty(RANKS * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor.contiguous())
    return whole


def on_rank(rank: int, x, weights, ids, of_experts, order: torch.Tensor | None) -> torch.Tensor:
    """order: which global expert each physical one is, for an expert_map; None: they are in order."""
    mine = slice(rank * EXPERTS, (rank + 1) * EXPERTS)
    expert_map, own = None, torch.arange(RANKS * EXPERTS)[mine]
    if order is not None:
        own = order[mine]
        expert_map = torch.full((RANKS * EXPERTS,), -1, dtype=torch.int32)
        expert_map[own] = torch.arange(EXPERTS, dtype=torch.int32)
    experts = make_experts(*(tensor[own] for tensor in of_experts), EXPERTS, ep_rank=rank, ep_size=RANKS, expert_map=expert_map)
    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS)
    all_x, all_weights, all_ids = (gathered(tensor[tokens]) for tensor in (x, weights, ids))
    partial, out = torch.full_like(all_x, float("nan")), torch.full((TOKENS, HIDDEN), float("nan"))
    experts.apply(partial, all_x, all_weights, all_ids)
    dist.reduce_scatter_tensor(out, partial)
    return out


@pytest.mark.parametrize("with_map", [False, True])
def test_ranks_equal_one_process(with_map):
    num_experts, num_tokens = RANKS * EXPERTS, RANKS * TOKENS
    x, weights = torch.randn(num_tokens, HIDDEN), torch.rand(num_tokens, TOP_K)
    ids = torch.rand(num_tokens, num_experts).topk(TOP_K).indices.int()
    of_experts = (torch.randn(num_experts, HIDDEN, 2 * INTERMEDIATE) * HIDDEN**-0.5, torch.randn(num_experts, 2 * INTERMEDIATE),
                  torch.randn(num_experts, INTERMEDIATE, HIDDEN) * INTERMEDIATE**-0.5, torch.randn(num_experts, HIDDEN))
    expected = torch.full_like(x, float("nan"))
    make_experts(*of_experts, num_experts).apply(expected, x, weights, ids)
    found = ranks(RANKS).run(on_rank, x, weights, ids, of_experts, torch.randperm(num_experts) if with_map else None)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
