"""torch.compile(fullgraph=True) of calls whose number of rows only the run will tell: one graph, and the eager call's results."""
import pytest
import torch

import moe_xe
from moe_xe.nn import Experts

from .block.case import HIDDEN as H, INTERMEDIATE as I

T, E, K = 9, 3, 3


@pytest.fixture(autouse=True)
def captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def arguments(device):
    def values(*shape):
        return torch.randn(shape, device=device)

    return dict(x=values(T, H), w13=values(E, 2 * I, H), w2=values(E, H, I), weights=torch.rand(T, K, device=device),
                ids=torch.randint(E, (T, K), dtype=torch.int32, device=device), logits=values(T, 8), counts=torch.tensor([1, 0, 3], device=device),
                experts=Experts(E, H, I, device=device, dtype=torch.float32))


CALLS = {
    "grouped_gemm": lambda chosen, x, w13, counts, **_: moe_xe.grouped_gemm(x[chosen], w13, counts)[:4],
    "grouped_gemm gathered": lambda chosen, x, w13, ids, **_: moe_xe.grouped_gemm(
        x, w13, (r := moe_xe.sort_tokens(ids[chosen], E)).tokens_per_expert, gather_indices=r.row_pairs, row_scales=r.row_scales),
    "grouped_outer": lambda chosen, x, counts, **_: moe_xe.grouped_outer(x[chosen], x[chosen], counts),
    "fused_moe": lambda chosen, x, w13, w2, weights, ids, **_: moe_xe.fused_moe(x[chosen], w13, w2, weights[chosen], ids[chosen]),
    "fused_moe out": lambda chosen, x, w13, w2, weights, ids, **_: moe_xe.fused_moe(
        (rows := x[chosen]), w13, w2, weights[chosen], ids[chosen], out=torch.empty_like(rows)),
    "route": lambda chosen, logits, **_: moe_xe.route(logits[chosen], K)[0],
    "sort_tokens": lambda chosen, ids, weights, **_: moe_xe.sort_tokens(ids[chosen], E, topk_weights=weights[chosen]).row_scales,
    "Experts": lambda chosen, x, weights, ids, experts, **_: experts(x[chosen], weights[chosen], ids[chosen]),
    "combine": lambda chosen, ids, x, **_: moe_xe.combine(x[chosen].repeat_interleave(K, 0), ids[chosen], E),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CALLS)
def test_one_graph(name, device):
    given, compiled = arguments(device), torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for number in (6, 8, 0) if name in ("fused_moe", "route", "sort_tokens", "combine") else (6, 8):
        chosen = torch.randperm(T, device=device) < number
        assert torch.equal(compiled(chosen, **given), CALLS[name](chosen, **given))


def test_gradients(device):
    given = arguments(device)
    grads = []
    for call in (CALLS["fused_moe"], torch.compile(CALLS["fused_moe"], fullgraph=True, backend="aot_eager")):
        leaves = {name: value.clone().requires_grad_() if name in ("x", "w13", "w2", "weights") else value for name, value in given.items()}
        call(torch.arange(T, device=device) % 2 == 0, **leaves).square().sum().backward()
        grads.append([leaves[name].grad for name in ("x", "w13", "w2", "weights")])
    for one, other in zip(*grads):
        assert torch.equal(one, other)


def test_sizes_that_do_not_agree_are_found_in_the_run(device):
    def call(a, scales, w, counts):
        return moe_xe.grouped_gemm(a[a[:, 0] > 0], w, counts, row_scales=scales[scales > 0])

    a, w, counts = arguments(device)["x"], torch.randn(E, I, H, device=device), torch.tensor([2, 0, 0], device=device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    a[:, 0] = torch.tensor([1.0] * 5 + [-1.0] * 4)
    assert torch.equal(compiled(a, a[:, 0].clone(), w, counts)[:2], call(a, a[:, 0].clone(), w, counts)[:2])
    with pytest.raises(RuntimeError, match="Runtime assertion failed|Eq"):
        compiled(a, -a[:, 0], w, counts)


def test_no_grad_of_an_op_in_a_graph(device):
    given = arguments(device)
    block = [given[name] for name in ("x", "w13", "w2", "weights", "ids")]
    compiled = torch.compile(lambda *block: torch.no_grad()(moe_xe.fused_moe)(*block), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*block), moe_xe.fused_moe(*block))
