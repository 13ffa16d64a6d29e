"""The interface's permutations against loops in float64, on odd sizes."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

import moe_xe
from moe_xe.grouped_gemm.interface import grouped_gemm, grouped_gemm_dW, grouped_gemm_dX, grouped_gemm_forward
from moe_xe.grouped_gemm.reference.moe_ops import get_routing_indices

from ..ops.block.case import HIDDEN, INTERMEDIATE
from ..ops.tiles import outer_tile, tile


N, K = 2 * INTERMEDIATE, HIDDEN       # whole vectors of no instruction set
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(tokens, topk, num_experts, n, k, dtype=torch.float32):
    """Tokens, weights, each token's choices and their weights, and how they sort; the last expert has no rows."""
    x, w = torch.randn(tokens, k, dtype=dtype), (torch.randn(num_experts, n, k) / k**0.5).to(dtype)
    ids = torch.rand(tokens, max(num_experts - 1, 1)).topk(topk).indices
    return x, w, ids, torch.rand(tokens, topk), *get_routing_indices(ids, num_experts)


def choices_product(x, w, ids):
    """[tokens * topk, N] float64 in token order: each token times the weights of each of its choices."""
    rows = x.double().repeat_interleave(ids.shape[1], dim=0)
    return torch.stack([w[e].double() @ row for row, e in zip(rows, ids.flatten().tolist())])


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("topk", [3, 1])
def test_permutations(dtype, topk):
    x, w, ids, weights, m_sizes, indices = make(37, topk, 6, N, K, dtype)
    expected = choices_product(x, w, ids)
    sorted_x = x[indices.long() // topk]

    first = grouped_gemm(x, w, m_sizes, topk, indices, permute_x=True)
    assert_close(first, expected[indices.long()], dtype)
    assert torch.equal(first, grouped_gemm(sorted_x, w, m_sizes, topk))     # no indices needed where nothing is permuted

    second = grouped_gemm(sorted_x, w, m_sizes, topk, indices, permute_y=True, is_first_gemm=False)
    assert_close(second, expected, dtype)
    weighted = grouped_gemm(sorted_x, w, m_sizes, topk, indices.long(), permute_y=True, topk_weights=weights, fuse_mul_post=True)
    assert_close(weighted, expected * weights.double().view(-1, 1), dtype)


@settings(settings.get_profile("compiling"))
@given(st.data())
def test_any_shape(data):
    topk, num_experts = data.draw(st.sampled_from([3, 1, 2])), data.draw(st.integers(4, 9))
    tokens, n = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([N, 1]))      # kernels are compiled for each n and topk
    x, w, ids, weights, m_sizes, indices = make(tokens, topk, num_experts, n, K)
    expected = torch.zeros(0, n, dtype=torch.float64) if tokens == 0 else choices_product(x, w, ids)
    y = grouped_gemm_forward(x[indices.long() // topk], w, m_sizes, topk, indices, permute_y=True,
                             topk_weights=weights.flatten(), fuse_mul_post=True)
    assert_close(y, expected * weights.double().view(-1, 1), torch.float32)
    assert_close(grouped_gemm_forward(x, w, m_sizes, topk, indices, permute_x=True), expected[indices.long()], torch.float32)


def test_transposed_weights_are_read_in_place():
    x, w, ids, _, m_sizes, indices = make(21, 3, 5, N, K)
    ekn = w.transpose(1, 2).contiguous()
    assert_close(grouped_gemm(x, ekn.transpose(1, 2), m_sizes, 3, indices, permute_x=True),
                 choices_product(x, w, ids)[indices.long()], torch.float32)


@pytest.mark.cpu_device
def test_configurations_reach_each_gemm(launched):
    """Of the call and of its gradients, of which X's is gathered."""
    x, w, ids, _, m_sizes, indices = make(21, 3, 5, N, K)
    forward, d_x, d_w = tile(28), tile(24), outer_tile(20)
    first = grouped_gemm(x.requires_grad_(), w.requires_grad_(), m_sizes, 3, indices, permute_x=True, kernel_config_fwd=forward,
                         kernel_config_bwd_dX=d_x, kernel_config_bwd_dW=d_w)
    assert_close(first, choices_product(x, w, ids)[indices.long()], torch.float32)
    gradient = torch.randn_like(first)
    got = torch.autograd.grad(first, (x, w), gradient)
    assert [line.config for line in launched() if line.origin == "given"] == [str(forward), str(d_x), str(d_w)]
    plain = grouped_gemm(x, w, m_sizes, 3, indices, permute_x=True)
    for mine, other in zip(got, torch.autograd.grad(plain, (x, w), gradient)):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.cpu_device
def test_one_configuration_of_three(launched):
    x, w, _, _, m_sizes, indices = make(21, 3, 5, N, K)
    x, rows = x.requires_grad_(), x[indices.long() // 3]
    grouped_gemm(x, w, m_sizes, 3, indices, permute_x=True, kernel_config_bwd_dX=tile(24)).sum().backward()
    assert [line.origin for line in launched()] == ["chosen", "given"]
    y = grouped_gemm_forward(rows.detach(), w, m_sizes, 3, kernel_config_fwd=tile(28))
    grouped_gemm_dX(y, w, m_sizes, 3, kernel_config_bwd_dX=tile(24))
    grouped_gemm_dW(rows.detach(), y, m_sizes, 3, kernel_config_bwd_dW=outer_tile(20))
    assert [line.config for line in launched()] == [str(tile(28)), str(tile(24)), str(outer_tile(20))]


@pytest.mark.usefixtures("fresh_tuner")
def test_autotune(launched):
    x, w, _, _, m_sizes, indices = make(21, 3, 5, N, K)
    tuned, plain = (grouped_gemm(x, w, m_sizes, 3, indices, permute_x=True, autotune=autotune) for autotune in (True, False))
    torch.testing.assert_close(tuned, plain)
    assert [line.origin for line in launched()] == ["tuned", "chosen"]


def test_compiles_to_one_graph():
    x, w, _, weights, m_sizes, indices = make(19, 3, 5, N, K)
    graph = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    for options in (dict(permute_x=True), dict(permute_y=True, topk_weights=weights, fuse_mul_post=True)):
        rows = x if "permute_x" in options else x[indices.long() // 3]
        assert torch.equal(graph(rows, w, m_sizes, 3, indices, **options), grouped_gemm(rows, w, m_sizes, 3, indices, **options))


X, W, IDS, WEIGHTS, SIZES, INDICES = make(10, 2, 4, 9, 8)
SORTED = X[INDICES.long() // 2]
WRONG = {
    "X is no tensor": (dict(X=None), TypeError, r"X must be a torch.Tensor \[tokens, K\], got NoneType"),
    "X has three dimensions": (dict(X=X[None]), ValueError, "X must have 2 dimensions"),
    "W has another K": (dict(W=W[..., :7]), ValueError, "X and W must agree in K"),
    "W has two dimensions": (dict(W=W[0]), ValueError, r"W must have 3 dimensions \[E, N, K\]"),
    "W has another dtype": (dict(W=W.half()), TypeError, "W must have X's dtype"),
    "m_sizes are too few": (dict(m_sizes=SIZES[:3]), ValueError, "m_sizes must have one entry for each of the 4 experts, got 3"),
    "m_sizes are float": (dict(m_sizes=SIZES.float()), TypeError, "m_sizes must be int32 or int64"),
    "topk is no count": (dict(topk=0), ValueError, "topk must be a positive int, got 0"),
    "topk is a tensor": (dict(topk=SIZES), ValueError, "topk must be a positive int, got tensor"),
    "both permuted": (dict(permute_y=True), ValueError, "permute_x and permute_y exclude each other"),
    "no indices for permute_x": (dict(gather_indices=None), ValueError, "gather_indices must be given for permute_x, got None"),
    "no indices for permute_y": (dict(X=SORTED, permute_x=False, permute_y=True, gather_indices=None), ValueError, "for permute_y"),
    "too few indices": (dict(gather_indices=INDICES[:19]), ValueError, "gather_indices must have one entry for each of the 20 total_rows, got 19"),
    "float indices": (dict(gather_indices=INDICES.float()), TypeError, "gather_indices must be int32 or int64"),
    "weights with permute_x": (dict(topk_weights=WEIGHTS, fuse_mul_post=True), ValueError, "fuse_mul_post needs permute_y=True"),
    "no weights": (dict(X=SORTED, permute_x=False, permute_y=True, fuse_mul_post=True), TypeError, "topk_weights must be a torch.Tensor"),
    "too few weights": (dict(X=SORTED, permute_x=False, permute_y=True, fuse_mul_post=True, topk_weights=WEIGHTS[:9]), ValueError,
                        r"topk_weights must have one entry for each of the 20 rows, got \[9, 2\]"),
    "weights are ints": (dict(X=SORTED, permute_x=False, permute_y=True, fuse_mul_post=True, topk_weights=IDS), TypeError, "topk_weights must be"),
    "indices are a list": (dict(gather_indices=[0]), TypeError, "gather_indices must be a torch.Tensor .* got list"),
    "a flag is an index": (dict(permute_x=INDICES), TypeError, "permute_x must be True or False"),
    "another config": (dict(kernel_config_fwd={"BLOCK_SIZE_M": 64}), TypeError, "kernel_config_fwd must be .*TileConfig or None, got dict"),
    "another config for dX": (dict(kernel_config_bwd_dX=1), TypeError, "kernel_config_bwd_dX must be .* got int"),
    "another config for dW": (dict(kernel_config_bwd_dW=1), TypeError, "kernel_config_bwd_dW must be .* got int"),
    "autotune with a config": (dict(autotune=True, kernel_config_fwd=moe_xe.explain(X, W, SIZES).config), ValueError, "must be None with autotune"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        grouped_gemm(**dict(X=X, W=W, m_sizes=SIZES, topk=2, gather_indices=INDICES, permute_x=True) | changes)


@pytest.mark.few(2)
@pytest.mark.parametrize("options", [dict(permute_x=True), {}, dict(permute_y=True), dict(permute_y=True, fuse_mul_post=True)], ids=str)
def test_gradients(options):
    topk = 3
    x, w, ids, weights, m_sizes, indices = make(37, topk, 6, N, K)
    if not options.get("permute_x"):
        x = x[indices.long() // topk]
    ours = [t.clone().requires_grad_() for t in (x, w, weights)]
    y = grouped_gemm(ours[0], ours[1], m_sizes, topk, indices, topk_weights=ours[2] if options.get("fuse_mul_post") else None, **options)
    dy = torch.randn_like(y)
    y.backward(dy)

    x64, w64, weights64 = (t.double().requires_grad_() for t in (x, w, weights))
    rows = x64[indices.long() // topk] if options.get("permute_x") else x64
    experts = ids.flatten()[indices.long()].long()
    expected = torch.einsum("rk,rnk->rn", rows, w64[experts])
    if options.get("permute_y"):
        expected = torch.zeros_like(expected).index_copy(0, indices.long(), expected)
    if options.get("fuse_mul_post"):
        expected = expected * weights64.view(-1, 1)
    expected.backward(dy.double())
    for t, t64 in zip(ours, (x64, w64, weights64)):
        if t64.grad is not None:
            assert_close(t.grad, t64.grad, torch.float32)

    if not options.get("fuse_mul_post"):
        dx = grouped_gemm_dX(dy, w, m_sizes, topk, indices, **options)
        if options.get("permute_x"):
            dx = dx.view(37, topk, K).sum(1)
        assert_close(dx, x64.grad, torch.float32)
        assert_close(grouped_gemm_dW(x, dy, m_sizes, topk, indices, **options), w64.grad, torch.float32)


def test_gradients_refuse_both_permutations():
    for wrapper, operands in ((grouped_gemm_dX, (SORTED, W.transpose(1, 2))), (grouped_gemm_dW, (SORTED, SORTED))):
        with pytest.raises(ValueError, match="permute_x and permute_y exclude each other"):
            wrapper(*operands, SIZES, 2, INDICES, permute_x=True, permute_y=True)


DY = torch.randn(20, 9)
WRONG_FOR_BOTH = {
    "topk is text": (dict(topk="x"), ValueError, "topk must be a positive int, got 'x'"),
    "topk is no count": (dict(topk=0), ValueError, "topk must be a positive int, got 0"),
    "indices are a list": (dict(gather_indices=[0]), TypeError, "gather_indices must be a torch.Tensor .* got list"),
    "indices are a list, not used": (dict(gather_indices=[0], permute_x=False, permute_y=False, X=SORTED), TypeError, "gather_indices must be"),
    "too few indices": (dict(gather_indices=INDICES[:19]), ValueError, "gather_indices must have one entry for each of the 20 total_rows, got 19"),
    "float indices": (dict(gather_indices=INDICES.float()), TypeError, "gather_indices must be int32 or int64"),
    "indices elsewhere": (dict(gather_indices=INDICES.to("meta")), (ValueError, TypeError), "gather_indices is on meta"),
    "no indices": (dict(gather_indices=None), ValueError, "gather_indices must be given for permute_x, got None"),
    "a flag is text": (dict(permute_y="no"), TypeError, "permute_y must be True or False, got 'no'"),
    "dY is no tensor": (dict(dY=None), TypeError, r"dY must be a torch.Tensor \[total_rows, N\], got NoneType"),
    "dY is int": (dict(dY=DY.int()), TypeError, "dY must be bfloat16, float16 or float32"),
    "dY has three dimensions": (dict(dY=DY[None]), ValueError, "dY must have 2 dimensions"),
    "m_sizes are a list": (dict(m_sizes=[1]), TypeError, "m_sizes must be a torch.Tensor"),
    "m_sizes are float": (dict(m_sizes=SIZES.float()), TypeError, "m_sizes must be int32 or int64"),
}
WRONG_FOR_DW = WRONG_FOR_BOTH | {
    "X is no tensor": (dict(X=[1.0]), TypeError, r"X must be a torch.Tensor \[tokens, K\], got list"),
    "X has another dtype": (dict(X=X.half()), TypeError, "X must have dY's dtype torch.float32, got torch.float16"),
    "X has other rows": (dict(X=X[:9]), ValueError, "one entry for each of the 18 total_rows"),
    "dY has other rows": (dict(dY=DY[:19]), ValueError, r"dY must have a row for each of the 20 total_rows, got float32\[19, 9\]"),
    "another config": (dict(kernel_config_bwd_dW=tile(28)), TypeError, "kernel_config_bwd_dW must be .* got CpuConfig"),
}
WRONG_FOR_DX = WRONG_FOR_BOTH | {
    "W is no tensor": (dict(W=None), TypeError, "W must be a torch.Tensor"),
    "W has another N": (dict(W=W[:, :8]), ValueError, "dY and W must agree"),
    "W has another dtype": (dict(W=W.half()), TypeError, "W must have dY's dtype"),
}


@pytest.mark.parametrize("case", WRONG_FOR_DW)
def test_bad_input_of_dW(case):
    changes, error, message = WRONG_FOR_DW[case]
    with pytest.raises(error, match=message):
        grouped_gemm_dW(**dict(X=X, dY=DY, m_sizes=SIZES, topk=2, gather_indices=INDICES, permute_x=True) | changes)


@pytest.mark.parametrize("case", WRONG_FOR_DX)
def test_bad_input_of_dX(case):
    changes, error, message = WRONG_FOR_DX[case]
    changes = {name: value for name, value in changes.items() if name != "X"}
    with pytest.raises(error, match=message):
        grouped_gemm_dX(**dict(dY=DY, W=W, m_sizes=SIZES, topk=2, gather_indices=INDICES, permute_x=True) | changes)


@pytest.mark.few(3)
@pytest.mark.parametrize("outside", [-1, 5, 99, 2**32 + 1, -(2**32) + 1])
def test_an_index_outside(outside):
    """With permute_y the product is not written, and what it was made of has no gradient; 64 bits are not cut to 32."""
    x, w, weights = torch.randn(2, K, requires_grad=True), torch.randn(1, N, K, requires_grad=True), torch.rand(2, requires_grad=True)
    sizes, indices = torch.tensor([2], dtype=torch.int32), torch.tensor([1, outside])
    y = grouped_gemm(x, w, sizes, 1, indices, permute_y=True, topk_weights=weights, fuse_mul_post=True)
    torch.testing.assert_close(y[1], weights[1] * (w[0] @ x[0]))
    dy = torch.stack([torch.full((N,), float("nan")), torch.randn(N)])      # row 0 was not written
    y.backward(dy)
    torch.testing.assert_close(x.grad, torch.stack([weights[1] * dy[1] @ w[0], torch.zeros(K)]))
    torch.testing.assert_close(w.grad[0], weights[1] * torch.outer(dy[1], x[0]))
    assert weights.grad[0] == 0 and weights.grad[1].isfinite()
    assert torch.equal(grouped_gemm_dX(dy, w, sizes, 1, indices, permute_y=True)[1], torch.zeros(K))
    torch.testing.assert_close(grouped_gemm_dW(x, dy, sizes, 1, indices, permute_y=True)[0], torch.outer(dy[1], x[0]))


def test_gradients_of_parameters():
    """A weight that requires a gradient is as good as one that does not."""
    dy, w = torch.randn(20, N), torch.randn(4, N, K)
    plain = grouped_gemm_dX(dy, w, SIZES, 2)
    assert torch.equal(grouped_gemm_dX(dy, w.requires_grad_(), SIZES, 2), plain)
