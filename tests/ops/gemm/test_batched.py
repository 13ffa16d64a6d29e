"""The batched layout, [E, max_rows, K] with counts: as the rows that count, one after the other."""
import pytest
import torch

import moe_xe
from moe_xe.bench.numerics import agrees, difference, reference_grouped_gemm
from moe_xe.ops.calls import known_calls

from ..tiles import K, N
from .test_gradients import assert_same_derivatives
from .test_grouped_gemm import DTYPES

EXPERTS, MOST = 5, 71
COUNTS = [3, 0, 71, 1, 33]
PLACES = torch.cat([expert * MOST + torch.arange(count) for expert, count in enumerate(COUNTS)])
BEYOND = torch.ones(EXPERTS * MOST, dtype=torch.bool).index_fill(0, PLACES, False)


def make(n, k, dtype, device):
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    return torch.randn(EXPERTS, MOST, k, dtype=dtype, device=device), torch.randn(EXPERTS, n, k, dtype=dtype, device=device), counts


def poisoned(n, dtype, device):
    return torch.full((EXPERTS, MOST, n), float("nan"), dtype=dtype, device=device)


def assert_right(out, a, w, bias=None):
    flat, rows, places = out.flatten(0, 1), a.flatten(0, 1), PLACES.to(out.device)
    reference = reference_grouped_gemm(rows[places], w, COUNTS, bias)
    assert agrees(flat[places], reference, a.shape[2]), difference(flat[places], reference)
    assert flat[BEYOND.to(out.device)].isnan().all()


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("bits", [32, 64])
def test_matches_the_reference(dtype, layout, bits, device):
    """Rows beyond are neither read nor written, also where rows have padding."""
    a, w, counts = make(83, 141, dtype, device)
    a.flatten(0, 1)[BEYOND.to(device)] = float("nan")
    bias, out = torch.randn(EXPERTS, 83, device=device), poisoned(90, dtype, device)
    given = w if layout == "enk" else w.transpose(1, 2).contiguous()
    counts = counts if bits == 32 else counts.long()
    result = moe_xe.grouped_gemm(a, given, counts, bias=bias, weight_layout=layout, out=out[..., :83], check=True)
    assert result.data_ptr() == out.data_ptr() and out[..., 83:].isnan().all()
    assert_right(result, a, w, bias)


def test_explain(device):
    a, w, counts = make(N, K, torch.bfloat16, device)
    for out in (None, poisoned(N, torch.bfloat16, device)):
        assert moe_xe.explain(a, w, counts, out=out).problem.rows_format.value == "batched"


def test_row_scales(device):
    a, w, counts = make(N, K, torch.float32, device)
    scales = torch.rand(EXPERTS, MOST, device=device) + 0.5
    out = moe_xe.grouped_gemm(a, w, counts, row_scales=scales, out=poisoned(N, torch.float32, device))
    assert_right(out / scales[..., None], a, w)


def test_counts_beyond_the_room_are_cut(device):
    a, w, counts = make(N, K, torch.float32, device)
    counts[2] = 2**31 - 1
    counts[1] = -4
    assert_right(moe_xe.grouped_gemm(a, w, counts, out=poisoned(N, torch.float32, device)), a, w)


def test_a_known_call(device):
    """Also of the public function: new results of the batched shape."""
    a, w, counts = make(N, K, torch.float32, device)
    results = [moe_xe.grouped_gemm(a, w, counts) for _ in range(4)]
    places = PLACES.to(device)
    for result in results:
        assert result.shape == (EXPERTS, MOST, N) and torch.equal(result.flatten(0, 1)[places], results[0].flatten(0, 1)[places])
    assert len({result.data_ptr() for result in results}) == 4
    assert len(known_calls()) == 2      # of the op and of the function


def test_outer(device):
    left, right, counts = make(K, N, torch.float32, device)[0], *make(N, K, torch.float32, device)[::2]
    places = PLACES.to(device)
    expected = moe_xe.grouped_outer(left.flatten(0, 1)[places], right.flatten(0, 1)[places], counts)
    for x in (left, right):
        x.flatten(0, 1)[BEYOND.to(device)] = float("nan")
    assert torch.equal(moe_xe.grouped_outer(left, right, counts), expected)


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_gradients(scaled, device):
    places = PLACES.to(device)
    experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(COUNTS)).to(device)
    tensors = [torch.randn(shape, device=device) for shape in ((EXPERTS, MOST, K), (EXPERTS, N, K), (EXPERTS, N), (EXPERTS, MOST))]
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)

    def ours(a, w, bias, scales=None):
        return moe_xe.grouped_gemm(a, w, counts, bias=bias, row_scales=scales).flatten(0, 1)

    def eager(a, w, bias, scales=None):
        y = torch.einsum("rk,rnk->rn", a.flatten(0, 1)[places], w[experts]) + bias[experts]
        y = y if scales is None else y * scales.flatten()[places, None]
        return y.new_zeros(EXPERTS * MOST, N).index_put((places,), y)

    assert_same_derivatives(ours, eager, tensors[:4 if scaled else 3], PLACES.tolist())


def test_second_derivatives_of_the_outer_product(device):
    places = PLACES.to(device)
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)

    def eager(left, right):
        left, right = (x.flatten(0, 1)[places] for x in (left, right))
        return torch.stack([x.T @ y for x, y in zip(left.split(COUNTS), right.split(COUNTS))])

    assert_same_derivatives(lambda left, right: moe_xe.grouped_outer(left, right, counts), eager,
                            [torch.randn(EXPERTS, MOST, columns, device=device) for columns in (N, K)])


def test_compile(device):
    a, w, counts = make(N, K, torch.float32, device)
    a.requires_grad_(), w.requires_grad_()
    places = PLACES.to(device)

    def step(a, w):
        return moe_xe.grouped_gemm(a, w, counts).flatten(0, 1)[places].square().sum()

    expected, found = (torch.autograd.grad(f(a, w), (a, w)) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(EXPERTS, 0, 48), (0, 7, 48)])
def test_no_room_or_no_experts(shape, device):
    a, w = torch.randn(shape, device=device), torch.randn(shape[0], 24, 48, device=device)
    counts = torch.zeros(shape[0], dtype=torch.int32, device=device)
    assert moe_xe.grouped_gemm(a, w, counts).shape == (*shape[:2], 24)
    assert not moe_xe.grouped_outer(a, a, counts).any()


A, W, ROWS = torch.randn(3, 10, 16), torch.randn(3, 8, 16), torch.tensor([2, 3, 10])
WRONG = {
    "another number of experts": (dict(a=A[:2]), ValueError, r"a must be \[E, max_rows, K\] with E = 3 and max_rows = 10, got float32\[2, 10, 16\]"),
    "a table": (dict(tokens_per_expert=ROWS[None]), ValueError, r"tokens_per_expert must have 1 dimensions \[experts\] where a is \[E, max_rows, K\]"),
    "experts lie apart": (dict(a=torch.randn(3, 12, 16)[:, :10]), ValueError, r"a must have its experts max_rows rows apart \(stride\(0\) == 160\)"),
    "gathered": (dict(gather_indices=ROWS.int()), ValueError, r"gather_indices must be left out where a is \[E, max_rows, K\]"),
    "scattered": (dict(scatter_indices=ROWS.int()), ValueError, r"scatter_indices must be left out where a is \[E, max_rows, K\]"),
    "flat out": (dict(out=torch.empty(30, 8)), ValueError, r"out must have 3 dimensions \[E, max_rows, N\]"),
    "narrow out": (dict(out=torch.empty(3, 10, 7)), ValueError, r"out must be float32\[30, 8\], got float32\[30, 7\]"),
    "flat row_scales": (dict(row_scales=torch.ones(30)), ValueError, r"row_scales must have 2 dimensions \[E, max_rows\]"),
    "a count beyond the room": (dict(tokens_per_expert=ROWS + 1), ValueError,
                                r"must lie in \[0, max_rows\], \[0, 10\]: tokens_per_expert\[2\] is 11"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        moe_xe.grouped_gemm(**dict(a=A, w=W, tokens_per_expert=ROWS, check=True) | changes)


def test_wrong_arguments_of_the_outer_product():
    with pytest.raises(ValueError, match=r"left must have 3 dimensions \[E, max_rows, P\]"):
        moe_xe.grouped_outer(A.flatten(0, 1), A, ROWS)
    with pytest.raises(ValueError, match=r"right must be \[E, max_rows, Q\] with E = 3 and max_rows = 10, got float32\[3, 9, 16\]"):
        moe_xe.grouped_outer(A, A[:, :9], ROWS)
    with pytest.raises(ValueError, match=r"gather_indices_left must be left out where rows are \[E, max_rows, ..\]"):
        moe_xe.grouped_outer(A, A, ROWS, gather_indices_left=ROWS.int())
