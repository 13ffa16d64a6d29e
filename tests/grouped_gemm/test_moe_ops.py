"""Each step of the torch-native block, and the block against a loop over tokens in float64."""
import pytest
import torch
import torch.nn.functional as F

from moe_xe.grouped_gemm.reference.moe_ops import (calculate_topk, get_routing_indices, permute, torch_grouped_gemm,
                                                   torch_moe_block, unpermute)


def test_softmax_weights():
    logits = torch.randn(13, 9, dtype=torch.bfloat16)
    weights, ids = calculate_topk(logits, 4)
    scores = logits.float().softmax(-1)
    assert torch.equal(weights, scores.sort(-1, descending=True).values[:, :4]) and torch.equal(weights, scores.gather(1, ids))
    renormalized, same_ids = calculate_topk(logits, 4, renormalize=True)
    torch.testing.assert_close(renormalized, weights / weights.sum(-1, keepdim=True))
    assert torch.equal(ids, same_ids)


def test_sigmoid_weights_keep_the_order_of_logits_where_sigmoid_is_flat():
    logits = torch.tensor([[50.0, 70.0, -1.0, 60.0]])
    weights, ids = calculate_topk(logits, 3, scoring="sigmoid")
    assert ids.tolist() == [[1, 3, 0]] and torch.equal(weights, torch.ones(1, 3))


@pytest.mark.parametrize("arguments, message", [
    (dict(top_k=0), r"top_k must lie in \[1, 9\], the number of experts, got 0"), (dict(top_k=10), "got 10"),
    (dict(top_k=1, scoring="max"), "scoring must be .* got 'max'")])
def test_bad_routing(arguments, message):
    with pytest.raises(ValueError, match=message):
        calculate_topk(torch.randn(2, 9), **arguments)


def test_sorting():
    ids = torch.tensor([[3, 0], [1, 3], [0, 1], [3, 4]])
    m_sizes, indices = get_routing_indices(ids, 6)
    assert m_sizes.tolist() == [2, 2, 0, 3, 1, 0] and m_sizes.dtype == torch.int32
    assert indices.tolist() == [1, 4, 2, 5, 0, 3, 6, 7] and indices.dtype == torch.int32
    x = torch.randn(4, 5)
    rows = permute(x, indices, 2)
    assert torch.equal(rows[0], x[0]) and torch.equal(rows[2], x[1]) and torch.equal(rows[-1], x[3])
    assert torch.equal(unpermute(rows, indices), x.repeat_interleave(2, dim=0))


def test_torch_grouped_gemm():
    x, w = torch.randn(11, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    y = torch_grouped_gemm(x, w, torch.tensor([5, 0, 6, 0]))
    assert torch.equal(y[:5], x[:5] @ w[0].T) and torch.equal(y[5:], x[5:] @ w[2].T)
    with pytest.raises(ValueError, match="m_sizes must sum to X's 11 rows, got 10"):
        torch_grouped_gemm(x, w, torch.tensor([5, 0, 5, 0]))


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_block(weight_on_input):
    tokens, topk, num_experts, hidden, intermediate = 9, 3, 5, 10, 7
    x = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    w13 = torch.randn(num_experts, 2 * intermediate, hidden, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(num_experts, hidden, intermediate, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, topk, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(tokens, num_experts).topk(topk).indices

    def expert(row, e):
        gate, up = (w13[e] @ row).chunk(2)
        return w2[e] @ (F.gelu(gate) * up)

    expected = torch.stack([sum(expert(weight * x[t], e) if weight_on_input else weight * expert(x[t], e)
                                for weight, e in zip(weights[t], ids[t].tolist())) for t in range(tokens)])
    actual = torch_moe_block(x, w13, w2, weights, ids, act_fn=F.gelu, weight_on_input=weight_on_input)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(y, (x, w13, w2, weights), upstream) for y in (actual, expected))):
        torch.testing.assert_close(got, want)
