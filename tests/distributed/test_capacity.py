"""Room for a fixed number of rows, without a wait of the host; rows that have no place are never silent."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_xe.distributed import combine, dispatch, expert_parallel_moe
from tests.distributed.case import block, expected, leaves, of_rank, placed, spans
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, assert_close, make_shared

TOKENS, EXPERTS = (7,) * 4, (2,) * 4
UNEVEN = (5, 0, 2, 1)
LIMITS = GRADIENT_LIMITS[torch.float32]


def on_rank(rank, arguments, grad, experts, capacity):
    own = of_rank(arguments, rank, TOKENS, experts)
    inputs = leaves(own)
    placed = None if experts == EXPERTS else experts
    out, overflow = expert_parallel_moe(**own, group=dist.group.WORLD, capacity=capacity, experts_of_ranks=placed)
    assert overflow.dtype == torch.int32 and overflow.shape == ()
    out.backward(grad[spans(TOKENS)[rank].start:][:TOKENS[rank]])
    return out.detach(), int(overflow), {name: tensor.grad for name, tensor in inputs.items()}


def rows_between(ids, experts, sender: int, receiver: int) -> torch.Tensor:
    """bool [T]: which tokens the sender has for the receiver."""
    sent = ids[spans(TOKENS)[sender].start:][:TOKENS[sender]]
    return torch.isin(sent, torch.tensor(placed(experts)[receiver], dtype=ids.dtype)).any(1)


def lost_tokens(ids, experts, capacity: int) -> tuple[torch.Tensor, list[int]]:
    """The first ones of a rank have places. And each sender's rows without one."""
    lost, overflow = torch.zeros(len(ids), dtype=torch.bool), []
    for sender, span in enumerate(spans(TOKENS)):
        rows = [rows_between(ids, experts, sender, receiver) for receiver in range(4)]
        without = [mask & (mask.cumsum(0) > capacity) for mask in rows]
        lost[span.start:span.stop] = torch.stack(without).any(0)
        overflow.append(int(sum(mask.sum() for mask in without)))
    return lost, overflow


@pytest.mark.parametrize("experts, capacity", [(EXPERTS, 7), (UNEVEN, 7), (EXPERTS, 3), (EXPERTS, 0)])
def test_block(experts, capacity):
    arguments = block(TOKENS, experts, shared=make_shared(29))
    x = arguments["hidden_states"]
    lost, overflow = lost_tokens(arguments["topk_ids"], experts, capacity)
    assert lost.any() == (capacity < 7)
    grad = torch.randn(x.shape)
    outs, found, gradients = zip(*ranks(4).run(on_rank, arguments, grad, experts, capacity))
    assert list(found) == overflow
    out = torch.cat(outs)
    assert out[lost].isnan().all() and out[~lost].isfinite().all()
    want = expected(arguments, grad)
    assert_close(out[~lost], want["out"][~lost], LIMITS)
    if not lost.any():
        for name in ("hidden_states", "topk_weights", "w13", "w2"):
            assert_close(torch.cat([part[name] for part in gradients if part[name] is not None]), want[name], LIMITS, name)


def compiled(rank, arguments):
    """On two of the ranks, as it takes seconds; with what it gives without a graph."""
    group, results = dist.new_group([0, 1]), []
    if rank > 1:
        return None

    def call(own):
        return expert_parallel_moe(**own, group=group, capacity=4)

    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        own = of_rank(arguments, rank, TOKENS[:2], EXPERTS[:2])
        inputs = leaves(own)
        out, overflow = function(own)
        out.nan_to_num().sum().backward()
        results.append([out.detach(), overflow, *(tensor.grad for tensor in inputs.values())])
    assert results[0][1] > 0
    return [torch.equal(eager.nan_to_num(), graph.nan_to_num()) for eager, graph in zip(*results)]


def test_in_a_compiled_graph():
    first, second, *_ = ranks(4).run(compiled, block(TOKENS[:2], EXPERTS[:2], shared=make_shared(29)))
    assert first == second == [True] * 9


class _Block(torch.nn.Module):
    def __init__(self, w13, w2, group):
        super().__init__()
        self.w13, self.w2, self.group = torch.nn.Parameter(w13), torch.nn.Parameter(w2), group

    def forward(self, *of_tokens):
        x, topk_weights, topk_ids = of_tokens
        return expert_parallel_moe(x, self.w13, self.w2, topk_weights, topk_ids, group=self.group, capacity=7)[0]


def exported(rank, arguments):
    group = dist.new_group([0, 1])
    if rank > 1:
        return None
    own = of_rank(arguments, rank, TOKENS[:2], EXPERTS[:2])
    model, of_tokens = _Block(own["w13"], own["w2"], group), (own["hidden_states"], own["topk_weights"], own["topk_ids"])
    with torch.no_grad():
        return torch.equal(torch.export.export(model, of_tokens, strict=False).module()(*of_tokens), model(*of_tokens))


@pytest.mark.full
def test_exported():
    assert ranks(4).run(exported, block(TOKENS[:2], EXPERTS[:2])) == [True, True, None, None]


def wrong_id(rank):
    ids = torch.tensor([[0, 1], [-1, 4], [2, 5], [3, -2]])
    dispatched = dispatch(torch.ones(4, 8), ids, torch.ones(4, 2), num_experts=4, group=None, capacity=4)
    assert dispatched.x.shape == (16, 8) and int((dispatched.topk_ids < 1).sum()) == 4
    return combine(dispatched.x, dispatched.handle), int(dispatched.overflow)


def test_tokens_with_wrong_ids_are_nan():
    for out, overflow in ranks(4).run(wrong_id):
        assert overflow == 0
        assert torch.equal(out[0], torch.full((8,), 2.0)) and torch.equal(out[1], torch.zeros(8)) and out[2:].isnan().all()


def refused(rank):
    errors = []
    for options in (dict(capacity=-1), dict(capacity=1, expand=True)):
        try:
            dispatch(torch.ones(4, 8), torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), num_experts=4, group=None, **options)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_bad_input():
    for first, second in ranks(4).run(refused):
        assert first.startswith("capacity must be from 0 to") and second.startswith("capacity must be None with expand=True")
