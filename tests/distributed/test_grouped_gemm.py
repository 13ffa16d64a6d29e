"""Rows that `dispatch` sorts by rank and expert, through grouped GEMMs where they lie."""
from __future__ import annotations

import torch
import torch.distributed as dist

from moe_xe import grouped_gemm
from moe_xe.distributed import combine, dispatch
from tests.distributed.case import block, expected, leaves, of_rank, spans
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, activated, assert_close

TOKENS, EXPERTS = (6, 0, 11, 3), (3, 1, 2, 1)
NAMES = "hidden_states", "topk_weights", "w13", "w2"


def on_rank(rank, arguments, grad):
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    inputs = leaves(own)
    d = dispatch(own["hidden_states"], own["topk_ids"], own["topk_weights"], num_experts=sum(EXPERTS), group=dist.group.WORLD, expand=True,
                 experts_of_ranks=EXPERTS)
    h = activated(grouped_gemm(d.x, own["w13"], d.tokens_per_expert), "silu", True, False, 1.0, None)
    out = combine(grouped_gemm(h, own["w2"], d.tokens_per_expert), d.handle)
    out.backward(grad[spans(TOKENS)[rank].start:][:len(out)])
    return out.detach(), *(inputs[name].grad for name in NAMES)


def test_equals_one_process():
    arguments = block(TOKENS, EXPERTS)
    grad = torch.randn(arguments["hidden_states"].shape)
    want = expected(arguments, grad)
    for name, parts in zip(("out", *NAMES), zip(*ranks(4).run(on_rank, arguments, grad))):
        assert_close(torch.cat(parts), want[name], GRADIENT_LIMITS[torch.float32], name)
