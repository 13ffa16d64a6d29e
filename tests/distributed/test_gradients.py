"""Backward has the same exchanges on all ranks, whatever each of them trains."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_xe.distributed import expert_parallel_moe
from tests.distributed.case import block, expected, leaves, of_rank, spans
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, assert_close
from tests.ops.lora.test_lora_moe import with_adapters

TOKENS, EXPERTS = (9, 0, 5, 3), (3, 0, 2, 2)
LIMITS = GRADIENT_LIMITS[torch.float32]


def on_rank(rank, arguments, grad, trained, checkpointed=False):
    """trained: of each rank, names of what requires a gradient."""
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    inputs = leaves(own)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trained[rank])

    def call(hidden_states, topk_weights):
        return expert_parallel_moe(**own | {"hidden_states": hidden_states, "topk_weights": topk_weights}, group=dist.group.WORLD)

    of_tokens = own["hidden_states"], own["topk_weights"]
    out = checkpoint(call, *of_tokens, use_reentrant=False) if checkpointed else call(*of_tokens)
    assert out.requires_grad == any(trained)
    if any(trained):
        out.backward(grad[spans(TOKENS)[rank].start:][:TOKENS[rank]])
    return {name: tensor.grad for name, tensor in inputs.items()}


EVERYTHING = {"hidden_states", "topk_weights", "w13", "w2"}


@pytest.mark.parametrize("trained", [[{"w13", "w2"}] * 4, [{"w13"}, set(), set(), {"hidden_states"}], [set(), EVERYTHING, set(), set()],
                                     [{"topk_weights"}] * 4, [set()] * 4],
                         ids=["experts", "of two ranks", "on one rank", "weights", "nothing"])
def test_what_is_trained(trained):
    arguments = block(TOKENS, EXPERTS)
    grad = torch.randn(sum(TOKENS), arguments["hidden_states"].shape[1])
    want = expected(arguments, grad)
    for rank, gradients in enumerate(ranks(4).run(on_rank, arguments, grad, trained)):
        check_gradients(rank, gradients, want, trained[rank])


def check_gradients(rank, gradients, want, names):
    """Of a rank without experts those of weights are there, too, and empty: DTensors' collectives wait for them."""
    assert {name for name, gradient in gradients.items() if gradient is not None} == names
    for name in names:
        spread = EXPERTS if name in ("w13", "w2") or name.startswith("lora") else TOKENS
        span = spans(spread)[rank]
        assert_close(gradients[name], want[name][span.start:span.stop], LIMITS, name)


def test_adapters_alone():
    arguments = with_adapters(block(TOKENS, EXPERTS))
    grad, names = torch.randn(sum(TOKENS), 50), {"lora13.a", "lora13.b", "lora2.a", "lora2.b"}
    want = expected(arguments, grad)
    for rank, gradients in enumerate(ranks(4).run(on_rank, arguments, grad, [names] * 4)):
        check_gradients(rank, gradients, want, names)


def test_checkpointed():
    arguments = block(TOKENS, EXPERTS)
    grad = torch.randn(sum(TOKENS), 50)
    want = expected(arguments, grad)
    for rank, gradients in enumerate(ranks(4).run(on_rank, arguments, grad, [EVERYTHING] * 4, True)):
        check_gradients(rank, gradients, want, EVERYTHING)


def backward_twice(rank, arguments):
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    x = own["hidden_states"].requires_grad_()
    out = expert_parallel_moe(**own, group=None)
    first, second = (torch.autograd.grad(out.sum(), x, retain_graph=retain)[0] for retain in (True, False))
    return torch.equal(first, second)


def test_a_graph_that_is_kept():
    assert ranks(4).run(backward_twice, block(TOKENS, EXPERTS)) == [True] * 4
