"""dispatch and combine, as those use them who compute the experts themselves."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_xe import fused_moe
from moe_xe.distributed import combine, dispatch
from tests.distributed.case import block, expected, of_rank, placed, spans
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, activated, assert_close

TOKENS, EXPERTS = (6, 0, 11, 3), (3, 0, 2, 1)
NAMES = "hidden_states", "topk_weights"


def in_plain_torch(dispatched, w13, w2):
    """Rows of one expert each, by rank and expert: one run after the other."""
    table, outs = dispatched.tokens_per_expert.tolist(), []
    runs = dispatched.x.split([count for row in table for count in row])
    for place, rows in enumerate(runs):
        expert = place % max(len(w13), 1)
        outs.append(activated(rows @ w13[expert].T, "silu", True, False, 1.0, None) @ w2[expert].T)
    return torch.cat(outs) if outs else dispatched.x


def on_rank(rank, arguments, grad, expand, options):
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    x, weights = (own[name].requires_grad_() for name in NAMES)
    dispatched = dispatch(x, own["topk_ids"], weights, num_experts=sum(EXPERTS), group=dist.group.WORLD, expand=expand,
                          experts_of_ranks=EXPERTS, **options)
    counts = dispatched.tokens_per_expert
    assert counts.dtype == torch.int32 and counts.shape == (4, EXPERTS[rank])
    if expand:
        y = in_plain_torch(dispatched, own["w13"], own["w2"])
    elif EXPERTS[rank]:
        y = fused_moe(dispatched.x, own["w13"], own["w2"], dispatched.topk_weights, dispatched.topk_ids)
    else:
        y = dispatched.x
    out = combine(y, dispatched.handle)
    out.backward(grad[spans(TOKENS)[rank].start:][:len(x)])
    return out.detach(), x.grad, weights.grad, counts, len(dispatched.x)


@pytest.mark.parametrize("expand", [False, True])
def test_equals_one_process(expand):
    arguments = block(TOKENS, EXPERTS)
    grad = torch.randn(sum(TOKENS), arguments["hidden_states"].shape[1])
    outs, *gradients, counts, rows = zip(*ranks(4).run(on_rank, arguments, grad, expand, {}))
    want = expected(arguments, grad)
    for name, parts in zip(("out", *NAMES), (outs, *gradients)):
        assert_close(torch.cat(parts), want[name], GRADIENT_LIMITS[torch.float32], name)
    assert_counts(arguments, counts, rows, expand)


def assert_counts(arguments, counts, rows, expand):
    """Of pairs; and a token is sent once to a rank, or once for each of its experts."""
    ids = arguments["topk_ids"]
    for rank, experts in enumerate(placed(EXPERTS)):
        for sender, span in enumerate(spans(TOKENS)):
            sent = ids[span.start:span.stop]
            assert counts[rank][sender].tolist() == [int((sent == expert).sum()) for expert in experts]
        here = torch.isin(ids, torch.tensor(experts, dtype=ids.dtype))
        assert rows[rank] == int(here.sum() if expand else here.any(1).sum())
