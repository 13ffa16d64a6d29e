"""The token dispatcher of torchtitan's interface, around plain experts: rows where they should be, outputs and gradients of one process."""
from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

from moe_xe.integrations.torchtitan import TokenDispatcher
from tests.distributed.processes import ranks

HIDDEN, EXPERTS, TOP_K, RANKS = 6, 7, 3, 4      # of the experts, ranks have 2, 2, 2 and 1
TOKENS = 5, 0, 9, 2


@functools.cache
def mesh() -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", (RANKS,))


def experts(rows: torch.Tensor, counts: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """counts: [experts], or [ranks, experts], of rows by rank and then expert."""
    of_rows = torch.arange(len(w)).repeat(counts.numel() // len(w)).repeat_interleave(counts.flatten().long())
    assert len(of_rows) == len(rows)
    return torch.einsum("rk,rnk->rn", rows, w[of_rows]).tanh()


def expected(x, scores, ids, w) -> torch.Tensor:
    y = torch.einsum("tk,tsnk->tsn", x, w[ids]).tanh()
    return (y * scores[..., None]).sum(1)


def make(num_tokens: int):
    ids = torch.rand(num_tokens, EXPERTS).topk(TOP_K).indices
    return torch.randn(num_tokens, HIDDEN), torch.rand(num_tokens, TOP_K), ids


def through(dispatcher: TokenDispatcher, x, scores, ids, w, grad, **padding) -> dict[str, torch.Tensor]:
    leaves = {"x": x.clone().requires_grad_(), "scores": scores.clone().requires_grad_(), "w": w.clone().requires_grad_()}
    rows, counts, metadata = dispatcher.dispatch(leaves["x"], leaves["scores"], ids, torch.bincount(ids.flatten(), minlength=EXPERTS))
    assert counts.dtype == torch.int32 and counts.dim() == (2 if dispatcher.rank_major else 1)
    out = dispatcher.combine(experts(rows, counts, leaves["w"]), metadata, leaves["x"], **padding)
    out[:len(x)].backward(grad)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def on_rank(rank: int, rank_major: bool, tokens, w, grad) -> dict[str, torch.Tensor]:
    dispatcher = TokenDispatcher(EXPERTS, TOP_K, rank_major=rank_major)
    dispatcher.wire_meshes(ep_mesh=mesh())
    return through(dispatcher, *(part.split(TOKENS)[rank] for part in tokens), w[2 * rank:2 * rank + 2], grad.split(TOKENS)[rank])


def of_one_process(x, scores, ids, w, grad) -> dict[str, torch.Tensor]:
    leaves = {"x": x.clone().requires_grad_(), "scores": scores.clone().requires_grad_(), "w": w.clone().requires_grad_()}
    out = expected(leaves["x"], leaves["scores"], ids, leaves["w"])
    out.backward(grad)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_equal(actual: dict, wanted: dict) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda message: f"{name}: {message}")


@pytest.mark.parametrize("rank_major", [False, True])
def test_ranks(rank_major):
    x, scores, ids = tokens = make(sum(TOKENS))
    w, grad = torch.randn(EXPERTS, HIDDEN, HIDDEN), torch.randn(len(x), HIDDEN)
    found = ranks(RANKS).run(on_rank, rank_major, tokens, w, grad)
    assert_equal({name: torch.cat([part[name] for part in found]) for name in found[0]}, of_one_process(*tokens, w, grad))


@pytest.mark.parametrize("rank_major", [False, True])
def test_one_rank(rank_major):
    x, scores, ids = tokens = make(11)
    w, grad = torch.randn(EXPERTS, HIDDEN, HIDDEN), torch.randn(len(x), HIDDEN)
    dispatcher = TokenDispatcher(EXPERTS, TOP_K, rank_major=rank_major)
    dispatcher.wire_meshes(ep_mesh=None)
    found = through(dispatcher, *tokens, w, grad, num_local_tokens_after_padding=13, local_seq_len_after_padding=13)
    assert found["out"].shape == (13, HIDDEN) and not found["out"][11:].any()
    assert_equal(found | {"out": found["out"][:11]}, of_one_process(*tokens, w, grad))


def test_rows_are_in_order_of_experts():
    x, scores, ids = make(11)
    rows, counts, _ = TokenDispatcher(EXPERTS, TOP_K).dispatch(x, scores, ids)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(rows, x[order // TOP_K]) and torch.equal(counts.long(), torch.bincount(ids.flatten(), minlength=EXPERTS))


def test_errors():
    x, scores, ids = make(3)
    with pytest.raises(ValueError, match=r"topk_expert_ids_TK must be \[3, 3\], T of x_TD and top_k, got int64\[2, 3\]"):
        TokenDispatcher(EXPERTS, 3).dispatch(x, scores, ids[:2])
    with pytest.raises(ValueError, match=r"topk_scores_TK must be \[3, 2\], T of x_TD and top_k, got float32\[3, 3\]"):
        TokenDispatcher(EXPERTS, 2).dispatch(x, scores, ids)
    with pytest.raises(TypeError, match="rank_major must be a bool"):
        TokenDispatcher(EXPERTS, 2, rank_major=1)
