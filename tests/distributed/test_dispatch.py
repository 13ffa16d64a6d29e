"""dispatch and combine, as those use them who compute the experts themselves."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_xe import fused_moe
from moe_xe.distributed import combine, dispatch
from moe_xe.distributed.message import RowFormat
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


def identity(rank, x, ids, wire_back, expand):
    mine = spans(TOKENS)[rank]
    x, ids = x[mine.start:mine.stop], ids[mine.start:mine.stop]
    dispatched = dispatch(x, ids, torch.ones(ids.shape), num_experts=4, group=None, wire_back=wire_back, expand=expand)
    return combine(dispatched.x, dispatched.handle)


@pytest.mark.parametrize("wire_back", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("expand", [False, True])
def test_rows_as_codes_on_their_way_back(wire_back, expand):
    """Each of the four ranks has an expert, and sends a token's row, or one for each slot, back as it came."""
    x, ids = torch.randn(sum(TOKENS), 37), torch.randint(-1, 4, (sum(TOKENS), 3))
    format = RowFormat(37, x.dtype, wire=wire_back)
    rounded, *_ = format.unpack(format.pack(x))
    slots = torch.nn.functional.one_hot(ids + 1, 5)[..., 1:]
    copies = (slots.sum(1) if expand else slots.amax(1)).sum(1, keepdim=True)
    out = torch.cat(ranks(4).run(identity, x, ids, wire_back, expand))
    assert_close(out, (rounded * copies).double(), (1e-6, 1e-7))


def wrong_y(rank):
    dispatched = dispatch(torch.ones(2, 8), torch.tensor([[0], [3]]), torch.ones(2, 1), num_experts=4, group=None)
    errors = []
    for y, handle in ((torch.ones(1, 7), dispatched.handle), (dispatched.x.half(), dispatched.handle), (None, dispatched.handle),
                      (dispatched.x, dispatched)):
        try:
            combine(y, handle)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_wrong_y():
    for rank, errors in enumerate(ranks(4).run(wrong_y)):
        rows = 4 if rank in (0, 3) else 0
        assert errors == [f"y must be float32[{rows}, 8], got float32[1, 7]", f"y must be float32[{rows}, 8], got float16[{rows}, 8]",
                          "y must be a torch.Tensor [R, H], got NoneType", "handle must be a Dispatched's handle, got Dispatched"]
