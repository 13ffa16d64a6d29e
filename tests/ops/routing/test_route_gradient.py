"""The gradient of the weights with respect to the logits, against float64 autograd of the chosen experts' weights."""
import pytest
import torch

import moe_xe

F = torch.nn.functional
SCORES = {"softmax": lambda x, ids: torch.softmax(x, -1).gather(1, ids), "topk_softmax": lambda x, ids: torch.softmax(x.gather(1, ids), -1),
          "sigmoid": lambda x, ids: torch.sigmoid(x).gather(1, ids), "sqrtsoftplus": lambda x, ids: F.softplus(x).sqrt().gather(1, ids)}


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("options", [{}, dict(renormalize=True, scaling_factor=2.5), dict(renormalize=True, num_groups=4, topk_groups=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_autograd(scoring, options, dtype, device):
    bias = torch.randn(16, device=device) if "num_groups" in options else None
    logits = torch.randn(23, 16, device=device).to(dtype).requires_grad_()
    weights, ids = moe_xe.route(logits, 3, scoring=scoring, correction_bias=bias, **options)
    gradient = torch.randn_like(weights)
    weights.backward(gradient)

    reference = logits.detach().double().requires_grad_()
    expected = SCORES[scoring](reference, ids.long())
    if options.get("renormalize"):
        expected = expected / expected.sum(-1, keepdim=True)
    (expected * options.get("scaling_factor", 1.0)).backward(gradient.double())
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_opcheck(device):
    logits = torch.randn(5, 8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_xe.route, (logits, 2, "softmax", None, 1, 1, "max", True, 1.0, torch.int32))


KINDS = [dict(), dict(expert_map=True, num_shared=2, shared=torch.bfloat16), dict(num_shared=1, shared=torch.float32, dtype=torch.float16)]


def routing_of(kind, device, num_tokens=19):
    """Ids of 7 experts, some dropped, as options of sort_tokens and combine; and the pairs that have a row, [T, slots]."""
    ids = torch.randint(-1, 8, (num_tokens, 3), device=device)
    options = dict(num_shared=kind.get("num_shared", 0))
    used = (ids >= 0) & (ids < 7)
    if kind.get("expert_map"):
        options["expert_map"] = torch.tensor([3, -1, 0, 6, 9, 2], dtype=torch.int32, device=device)
        used = ((ids >= 0) & (ids < 6)) & ~((ids == 1) | (ids == 4))
    return ids, options, torch.cat([used, used.new_ones(num_tokens, options["num_shared"])], 1)


@pytest.mark.parametrize("kind", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.full)], ids=str)
def test_gradients_of_sorted_weights(kind, device):
    ids, options, used = routing_of(kind, device)
    weights = torch.rand(19, 3, device=device).to(kind.get("dtype", torch.bfloat16)).requires_grad_()
    shared = torch.rand(19, kind["num_shared"], device=device).to(kind["shared"]).requires_grad_() if "shared" in kind else None
    rows = moe_xe.sort_tokens(ids, 7, topk_weights=weights, shared_weights=shared, routed_scaling_factor=2.5, **options)
    assert not rows.tokens_per_expert.requires_grad and not rows.row_pairs.requires_grad
    factors = torch.randn(len(rows.row_scales), device=device, requires_grad=True)
    loss = (rows.row_scales.square() * factors).sum()
    leaves = [leaf for leaf in (weights, shared) if leaf is not None]
    grads = torch.autograd.grad(loss, leaves, create_graph=True)

    # the same with torch: each used pair's scale, squared, times the factor of the row that it has
    of_pair = torch.zeros(used.numel() + 1, device=device).scatter(0, torch.where(rows.row_pairs < 0, used.numel(), rows.row_pairs.long()), factors)
    of_pair = of_pair[:-1].view(used.shape)
    scales = torch.cat([weights.float() * 2.5, shared.float() if shared is not None else weights.new_ones(19, options["num_shared"]).float()], 1)
    expected = torch.autograd.grad((scales.square() * of_pair * used).sum(), leaves, create_graph=True)
    for got, want, leaf in zip(grads, expected, leaves):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)
    second, wanted = (torch.autograd.grad(sum(g.float().square().sum() for g in of), [*leaves, factors]) for of in (grads, expected))
    for got, want in zip(second, wanted):
        torch.testing.assert_close(got, want, rtol=2**-5, atol=1e-3)


@pytest.mark.parametrize("kind", [*KINDS[:2], pytest.param(KINDS[2], marks=pytest.mark.full)], ids=str)
def test_gradients_of_sums(kind, device):
    """Rows of dropped pairs hold NaN, and have no gradient."""
    ids, options, used = routing_of(kind, device)
    y = torch.randn(used.numel(), 5, device=device).to(kind.get("dtype", torch.float32))
    y[~used.flatten()] = float("nan")
    y.requires_grad_()
    out = moe_xe.combine(y, ids, 7, out_dtype=torch.float32, **options)
    reference = torch.where(used[..., None], y.view(*used.shape, 5).float(), 0).sum(1)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)
    factors = torch.randn_like(out, requires_grad=True)
    (got,), (want,) = (torch.autograd.grad((result.square() * factors).sum(), y, create_graph=True) for result in (out, reference))
    assert got.dtype == y.dtype
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-4)
    assert (got[~used.flatten()] == 0).all()
    for got, want in zip(*(torch.autograd.grad(grad[used.flatten()].float().square().sum(), [y, factors]) for grad in (got, want))):
        torch.testing.assert_close(got, want, rtol=2**-5, atol=1e-2)


def test_gradients_of_no_tokens(device):
    ids = torch.empty(0, 3, dtype=torch.int64, device=device)
    weights, y = torch.rand(0, 3, device=device, requires_grad=True), torch.rand(0, 4, device=device, requires_grad=True)
    moe_xe.sort_tokens(ids, 7, topk_weights=weights).row_scales.sum().backward()
    moe_xe.combine(y, ids, 7).sum().backward()
    assert weights.grad.shape == (0, 3) and y.grad.shape == (0, 4)


def test_a_layer_of_single_ops_learns(device):
    """sort_tokens, a GEMM and combine, composed by the user: the gradient of the router's weights."""
    x, w = torch.randn(11, 8, device=device), torch.randn(5, 6, 8, device=device)
    ids = torch.stack([torch.randperm(5, device=device)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, device=device, requires_grad=True)
    rows = moe_xe.sort_tokens(ids, 5, topk_weights=weights)
    y = moe_xe.grouped_gemm(x, w, rows.tokens_per_expert, gather_indices=rows.row_pairs, gather_divisor=2)
    pairs = torch.zeros(22, 6, device=device).index_copy(0, rows.row_pairs.long(), y * rows.row_scales[:, None])
    moe_xe.combine(pairs, ids, 5).square().sum().backward()

    reference = weights.detach().double().requires_grad_()
    products = torch.einsum("th,tknh->tkn", x.double(), w.double()[ids])
    (products * reference[..., None]).sum(1).square().sum().backward()
    torch.testing.assert_close(weights.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_opcheck_of_sums(kind, device):
    ids, options, used = routing_of(kind, device)
    y = torch.randn(used.numel(), 5, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.moe_xe.combine, (y, ids, 7, options.get("expert_map"), options["num_shared"], torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradient_of_sorted_weights(dynamic, device):
    """In place of opcheck, which cannot add up results of which the first are integers."""
    def loss(ids, weights):
        return moe_xe.sort_tokens(ids, 7, topk_weights=weights).row_scales.square().sum()

    ids, _, used = routing_of(KINDS[0], device)
    weights = torch.rand(19, 3, device=device, requires_grad=True)
    got, = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")(ids, weights), weights)
    torch.testing.assert_close(got, 2 * weights.detach() * used)
