"""Gradients, and gradients of gradients, of grouped products against eager ones in float64; indices outside; rows that nobody computes."""
import pytest
import torch

import moe_xe

from ..tiles import K, N

COUNTS, ROWS, ENDS = [0, 5, 1, 3], 12, [0, 5, 6, 9]      # three rows are nobody's
EXPERTS = torch.tensor([1] * 5 + [2] + [3] * 3)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def eager_gemm(a, w, bias=None, scales=None, sources=None, targets=None):
    """Rows that are not computed are zero."""
    experts, rows = EXPERTS.to(a.device), len(EXPERTS)
    y = torch.einsum("rk,rnk->rn", (a if sources is None else a[sources])[:rows], w[experts])
    y = y if bias is None else y + bias[experts]
    y = y if scales is None else y * scales[:rows, None]
    targets = torch.arange(rows, device=a.device) if targets is None else targets[:rows]
    inside = (targets >= 0) & (targets < ROWS)
    return y.new_zeros(ROWS, w.shape[1]).index_put((targets[inside],), y[inside])


def assert_same_derivatives(ours, eager, tensors, mask=None):
    """First and second ones, along random directions. mask: the rows of the result that are computed."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    inputs64 = [t.detach().double().requires_grad_() for t in tensors]
    y, y64 = ours(*inputs), eager(*inputs64)
    along = torch.randn_like(y64)
    rows = slice(None) if mask is None else mask
    torch.testing.assert_close(y[rows].detach().double(), y64[rows].detach(), rtol=1e-4, atol=1e-4)
    results = []
    directions = [torch.randn_like(t) for t in inputs64]
    for value, operands in ((y, inputs), (y64, inputs64)):
        dtype = value.dtype
        dy = along.to(dtype).requires_grad_()
        first = torch.autograd.grad(value, operands, dy, create_graph=True)
        loss = sum((g * u.to(dtype)).sum() for g, u in zip(first, directions))
        results.append([*first, *torch.autograd.grad(loss, [dy, *operands], materialize_grads=True)])
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine.detach().double(), reference.detach(), rtol=1e-4, atol=1e-4)


GATHER, SCATTER = [0, 7, 30, 30, 2, 5, 18, 24, 9, -1, 99, -7], [3, 0, -1, 11, 5, 12, 7, 1, 99, 2, 4, 6]


@pytest.mark.parametrize("case", [*(pytest.param(case, marks=pytest.mark.full) for case in ("bias", "gathered", "gathered and scaled")),
                                  "scattered and scaled"])
def test_grouped_gemm(case, device):
    rows, options, more = ints(COUNTS, device), {}, {}
    if "gathered" in case:
        indices = ints(GATHER, device)
        options, more = dict(gather_indices=indices, gather_divisor=3), dict(sources=torch.where(indices < 0, 98, indices).long().clamp(max=32) // 3)
    elif "scattered" in case:
        options = dict(scatter_indices=ints(SCATTER, device))
        more = dict(targets=options["scatter_indices"].long())
    tensors = [torch.randn(shape, device=device) for shape in ((11 if "gathered" in case else ROWS, K), (4, N, K), (4, N), (ROWS,))]
    count = 4 if "scaled" in case else 3

    def ours(a, w, bias=None, scales=None):
        return moe_xe.grouped_gemm(a, w, rows, bias=bias, row_scales=scales, **options)

    written = [row for row in SCATTER[:9] if 0 <= row < ROWS] if "scattered" in case else list(range(9))
    assert_same_derivatives(ours, lambda *t: eager_gemm(*t, **more), tensors[:count], written)


@pytest.mark.parametrize("form", ["2D x 3D", "2D x 2D", "3D x 2D", "3D x 3D"])
def test_grouped_mm(form, device):
    slices = [slice(begin, end) for begin, end in zip([0, *ENDS], ENDS)]
    (a_shape, b_shape), eager = {
        "2D x 3D": (((9, K), (4, K, N)), lambda a, b: torch.cat([a[s] @ w for s, w in zip(slices, b)])),
        "2D x 2D": (((N, 9), (9, K)), lambda a, b: torch.stack([a[:, s] @ b[s] for s in slices])),
        "3D x 2D": (((4, N, K), (K, 9)), lambda a, b: torch.cat([w @ b[:, s] for s, w in zip(slices, a)], dim=1)),
        "3D x 3D": (((4, 2, K), (4, K, N)), torch.bmm),
    }[form]
    offs = None if form == "3D x 3D" else ints(ENDS, device)
    assert_same_derivatives(lambda a, b: moe_xe.grouped_mm(a, b, offs=offs), eager,
                            [torch.randn(a_shape, device=device), torch.randn(b_shape, device=device)])


@pytest.mark.parametrize("side", [None, "left", pytest.param("right", marks=pytest.mark.full)])
def test_grouped_outer(side, device):
    rows, indices = ints(COUNTS, device), ints(GATHER, device)
    options = {} if side is None else {f"gather_indices_{side}": indices, "gather_divisor": 3}
    sources = torch.where(indices < 0, 98, indices).long().clamp(max=32)[:9] // 3
    operands = [torch.randn(11 if side == name else ROWS, columns, device=device) for name, columns in (("left", N), ("right", K))]

    def eager(left, right):
        left, right = (x[sources] if side == name else x[:9] for name, x in (("left", left), ("right", right)))
        return torch.stack([x.T @ y for x, y in zip(left.split(COUNTS), right.split(COUNTS))])

    assert_same_derivatives(lambda left, right: moe_xe.grouped_outer(left, right, rows, **options), eager, operands)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("op", ["grouped_gemm", "grouped_mm", "grouped_outer"])
def test_a_second_derivative_by_hand(op, dtype, device):
    """a = 1, w = 2, y = aw: y's, and the square's of 2aw^2, the gradient of y^2: w + 8aw^4."""
    a, one = torch.ones(1, 1, dtype=dtype, device=device, requires_grad=True), torch.ones(1, dtype=torch.int32, device=device)
    w = torch.full((1, 1), 2.0, dtype=dtype, device=device)
    y = {"grouped_gemm": lambda: moe_xe.grouped_gemm(a, w[None], one), "grouped_mm": lambda: moe_xe.grouped_mm(a, w[None], offs=one),
         "grouped_outer": lambda: moe_xe.grouped_outer(a, w, one)}[op]()
    g, = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    (y.sum() + g.square().sum()).backward()
    assert a.grad.item() == 130


def leaves(device, *shapes):
    return [torch.ones(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("outside", [-1, 2, 99])
@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_scatter_index_outside_has_no_gradient(outside, scaled, device):
    a, w, scales, bias = leaves(device, (2, 1), (1, 1, 1), (2,), (1, 1))
    out = moe_xe.grouped_gemm(a, w, ints([2], device), bias=bias, scatter_indices=ints([1, outside], device),
                              row_scales=scales if scaled else None)
    out[1].sum().backward()
    assert a.grad.tolist() == [[1], [0]] and w.grad.item() == 1 and bias.grad.item() == 1
    if scaled:
        assert scales.grad.tolist() == [2, 0]


@pytest.mark.parametrize("outside", [-1, 3, 99, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_gather_index_outside_is_the_last_row(outside, scaled, device):
    a = torch.tensor([[1.0], [2.0], [4.0]], device=device, requires_grad=True)
    w, scales, bias = leaves(device, (1, 1, 1), (2,), (1, 1))
    out = moe_xe.grouped_gemm(a, w, ints([2], device), bias=bias, gather_indices=ints([0, outside], device), row_scales=scales if scaled else None)
    assert out.tolist() == [[2], [5]]
    out.sum().backward()
    assert a.grad.tolist() == [[1], [0], [1]] and w.grad.item() == 5 and bias.grad.item() == 2
    if scaled:
        assert scales.grad.tolist() == [2, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_grouped_outer_with_an_index_outside(side, device):
    gathered = torch.tensor([[1.0], [2.0], [4.0]], device=device, requires_grad=True)
    other, = leaves(device, (2, 1))
    operands = (gathered, other) if side == "left" else (other, gathered)
    out = moe_xe.grouped_outer(*operands, ints([2], device), **{f"gather_indices_{side}": ints([0, -1], device)})
    assert out.item() == 5
    out.sum().backward()
    assert gathered.grad.tolist() == [[1], [0], [1]] and other.grad.tolist() == [[1], [4]]


def test_a_dropped_id(device):
    """sort_tokens puts its row beyond the counts, with pair -1."""
    a, w, bias = leaves(device, (2, 1), (1, 1, 1), (1, 1))
    tokens_per_expert, pairs, _ = moe_xe.sort_tokens(torch.tensor([[0], [5]], device=device), 1)
    out = moe_xe.grouped_gemm(a, w, tokens_per_expert, bias=bias, gather_indices=pairs)
    assert out[0].item() == 2
    out.sum().backward()
    assert a.grad.tolist() == [[1], [0]] and w.grad.item() == bias.grad.item() == 1


def test_a_gradient_of_rows_that_are_not_computed_is_not_looked_at(device):
    a, w, bias, scales = leaves(device, (ROWS, K), (4, N, K), (4, N), (ROWS,))
    out = moe_xe.grouped_gemm(a, w, ints(COUNTS, device), bias=bias, row_scales=scales)
    gradient = torch.ones_like(out)
    gradient[9:] = float("nan")
    out.backward(gradient)
    assert all(t.grad.isfinite().all() for t in (a, w, bias, scales)) and (a.grad[9:] == 0).all() and (scales.grad[9:] == 0).all()


# --------------------------------------------------------------------------------------------------- nothing to compute

def test_no_k(device):
    """Zeros, plus bias, times factors; rows of nobody stay."""
    a, w = torch.ones(4, 0, device=device, requires_grad=True), torch.ones(2, 3, 0, device=device, requires_grad=True)
    bias = torch.arange(6.0, device=device).view(2, 3).requires_grad_()
    scales = torch.tensor([1.0, 2.0, 3.0, 9.0], device=device, requires_grad=True)
    rows = ints([1, 2], device)
    out = moe_xe.grouped_gemm(a, w, rows, bias=bias, row_scales=scales)
    assert out[:3].tolist() == [[0, 1, 2], [6, 8, 10], [9, 12, 15]]
    out.sum().backward()
    assert a.grad.shape == a.shape and w.grad.shape == w.shape
    assert bias.grad.tolist() == [[1] * 3, [5] * 3] and scales.grad.tolist() == [3, 12, 12, 0]
    into = torch.full((4, 3), 7.0, device=device)
    with torch.no_grad():
        moe_xe.grouped_gemm(a, w, rows, bias=bias, row_scales=scales, out=into)
    assert into.tolist() == [*out[:3].tolist(), [7] * 3]
    assert moe_xe.explain(a, w, rows).problem.n == 3


@pytest.mark.parametrize("a_shape, w_shape, counts", [((0, 5), (0, 3, 5), []), ((4, 5), (0, 3, 5), []), ((4, 5), (2, 0, 5), [1, 3]),
                                                      ((0, 5), (2, 3, 5), [0, 0]), ((0, 0), (0, 0, 0), [])], ids=str)
def test_an_empty_dimension(a_shape, w_shape, counts, device):
    """Of experts, columns, rows or all: results of their shape, and gradients of zero."""
    a, w, bias = leaves(device, a_shape, w_shape, w_shape[:2])
    out = moe_xe.grouped_gemm(a, w, ints(counts, device), bias=bias)
    assert out.shape == (a_shape[0], w_shape[1])
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in (a, w, bias))
    left, right = leaves(device, a_shape, (a_shape[0], w_shape[1]))
    product = moe_xe.grouped_outer(left, right, ints(counts, device))
    assert product.shape == (len(counts), a_shape[1], w_shape[1])
    product.sum().backward()
    assert left.grad.shape == left.shape and right.grad.shape == right.shape


@pytest.mark.parametrize("a_shape, b_shape, ends, shape", [
    ((4, 0), (2, 0, 3), [1, 4], (4, 3)), ((0, 5), (0, 5, 3), [], (0, 3)), ((3, 0), (0, 5), [0, 0], (2, 3, 5)), ((3, 4), (4, 5), [], (0, 3, 5)),
    ((2, 3, 0), (0, 4), [1, 4], (3, 4)), ((2, 3, 0), (2, 0, 4), None, (2, 3, 4)), ((0, 3, 5), (0, 5, 4), None, (0, 3, 4))], ids=str)
def test_empty_forms_of_grouped_mm(a_shape, b_shape, ends, shape, device):
    a, b = leaves(device, a_shape, b_shape)
    out = moe_xe.grouped_mm(a, b, offs=None if ends is None else ints(ends, device))
    assert out.shape == shape and not out.any()
    out.sum().backward()
    assert a.grad.shape == a.shape and b.grad.shape == b.shape and not a.grad.any() and not b.grad.any()
