"""Rows by rank and, within a rank, by expert, with a table of counts [ranks, experts]: as the same rows sorted by expert."""
import pytest
import torch

import moe_xe
from moe_xe.bench.numerics import agrees, difference, reference_grouped_gemm

from ..tiles import K, N
from .test_gradients import assert_same_derivatives
from .test_grouped_gemm import DTYPES, poisoned

# no rows of a rank, of an expert, of both; one row; several tiles
TABLE = torch.tensor([[3, 0, 70, 1, 0], [0, 0, 0, 0, 0], [2, 0, 33, 5, 0], [65, 0, 1, 5, 0]], dtype=torch.int32)
EXPERTS, UNUSED = TABLE.shape[1], 3
USED = int(TABLE.sum())
COUNTS = TABLE.sum(0).tolist()


def order_of(table):
    """For each row in order of experts, where it is."""
    return torch.arange(EXPERTS).repeat(len(table)).repeat_interleave(table.flatten()).argsort(stable=True)


ORDER = order_of(TABLE)


def within_more(table=TABLE, dtype=torch.int32):
    """As a slice of what came from all ranks."""
    wide = torch.full((len(table), EXPERTS + 4), 999, dtype=dtype)
    wide[:, 3:-1] = table
    return wide[:, 3:-1]


def make(n, k, dtype, device, rows=USED + UNUSED):
    return torch.randn(rows, k, dtype=dtype, device=device), torch.randn(EXPERTS, n, k, dtype=dtype, device=device)


def assert_right(out, a, w, bias=None):
    """Of rows by rank."""
    order = ORDER.to(out.device)
    reference = reference_grouped_gemm(a[order], w, COUNTS, bias)
    assert agrees(out[order], reference, a.shape[1]), difference(out[order], reference)
    assert out[USED:].isnan().all()


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("counts", ["as a slice", "int64"])
def test_matches_the_reference(dtype, layout, counts, device):
    a, w = make(83, 141, dtype, device)
    bias = torch.randn(EXPERTS, 83, device=device)
    table = within_more().to(device) if counts == "as a slice" else TABLE.long().to(device)
    given = w if layout == "enk" else w.transpose(1, 2).contiguous()
    out = poisoned(len(a), 83, dtype, device)
    assert moe_xe.grouped_gemm(a, given, table, bias=bias, weight_layout=layout, out=out, check=True) is out
    assert_right(out, a, w, bias)


def test_a_known_call_reads_the_table_anew(device):
    a, w = make(N, K, torch.float32, device)
    table = within_more().to(device)
    for shift in range(3):
        shifted = TABLE.roll(shift, 1)
        table[:] = shifted.to(device)
        order = order_of(shifted).to(device)
        expected = reference_grouped_gemm(a[order], w, shifted.sum(0).tolist())
        assert agrees(moe_xe.grouped_gemm(a, w, table)[order], expected, a.shape[1])


def test_one_rank_is_plain_counts(device):
    a, w = make(N, K, torch.float32, device)
    y = torch.randn(len(a), N, device=device)
    counts = torch.tensor(COUNTS, dtype=torch.int32, device=device)
    assert torch.equal(moe_xe.grouped_gemm(a, w, counts[None])[:USED], moe_xe.grouped_gemm(a, w, counts)[:USED])
    assert moe_xe.explain(a, w, counts[None]) == moe_xe.explain(a, w, counts)
    assert torch.equal(moe_xe.grouped_outer(y, a, counts[None]), moe_xe.grouped_outer(y, a, counts))


def test_explain_names_the_ranks(device):
    a, w = make(83, 64, torch.bfloat16, device)
    plan = moe_xe.explain(a, w, TABLE.to(device))
    assert plan.problem.ranks == len(TABLE) and f"of {len(TABLE)} ranks" in str(plan.problem)


@pytest.mark.parametrize("permuted", ["gather", "scatter"])
def test_permuted_and_scaled(permuted, device):
    """Indices and factors are of rows in their order."""
    tokens = 20 if permuted == "gather" else USED + UNUSED
    a, w = make(N, K, torch.float32, device, tokens)
    scales = torch.randn(USED + UNUSED, device=device)
    indices = torch.randint(0, tokens, (USED + UNUSED,)) if permuted == "gather" else torch.randperm(USED + UNUSED)
    given = {f"{permuted}_indices": indices.int().to(device)}
    out = moe_xe.grouped_gemm(a, w, TABLE.to(device), row_scales=scales, out=poisoned(USED + UNUSED, N, torch.float32, device), **given)
    of_rows = out if permuted == "gather" else out[indices.to(device)]
    rows = a[indices.to(device)] if permuted == "gather" else a
    assert_right(of_rows / scales[:, None], rows, w)


@pytest.mark.parametrize("wrong", ["negative", "more than there are rows"])
def test_wrong_counts_leave_rows_out(wrong, device):
    a, w = make(N, K, torch.float32, device)
    table = TABLE.clone()
    table[2, 2] = -5 if wrong == "negative" else 2**31 - 1
    out = moe_xe.grouped_gemm(a, w, table.to(device), out=poisoned(len(a), N, torch.float32, device)).cpu()
    before = int(TABLE[:2].sum()) + int(TABLE[2, 0])
    assert torch.equal(out[:before], moe_xe.grouped_gemm(a, w, TABLE.to(device))[:before].cpu())
    after = len(a) if wrong != "negative" else before + int(TABLE[2, 3:].sum()) + int(TABLE[3].sum())
    assert not out[:after].isnan().any() and out[after:].isnan().all()


def test_quantised_weights(device):
    a, w = make(40, 64, torch.bfloat16, device)
    q = moe_xe.QuantizedWeight.quantize(w, "int4", group=(1, 32))
    out = moe_xe.grouped_gemm(a, q, TABLE.to(device), out=poisoned(len(a), 40, torch.bfloat16, device))
    assert_right(out, a, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_gradients(scaled, device):
    order = ORDER.to(device)
    experts = torch.arange(EXPERTS).repeat_interleave(torch.tensor(COUNTS)).to(device)
    tensors = [torch.randn(shape, device=device) for shape in ((USED + UNUSED, K), (EXPERTS, N, K), (EXPERTS, N), (USED + UNUSED,))]

    def ours(a, w, bias, scales=None):
        return moe_xe.grouped_gemm(a, w, TABLE.to(device), bias=bias, row_scales=scales)

    def eager(a, w, bias, scales=None):
        y = torch.einsum("rk,rnk->rn", a[order], w[experts]) + bias[experts]
        y = y if scales is None else y * scales[order, None]
        return y.new_zeros(USED + UNUSED, N).index_put((order,), y)

    assert_same_derivatives(ours, eager, tensors[:4 if scaled else 3], list(range(USED)))


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [None, "left", "right"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_outer_sums_the_rows_of_all_ranks(dtype, gathered, accumulate, device):
    """In the order of plain counts."""
    order = ORDER.to(device)
    left, right = (torch.randn(USED + UNUSED, columns, dtype=dtype, device=device) for columns in (45, 101))
    indices = torch.randint(0, USED, (USED + UNUSED,), dtype=torch.int32, device=device)
    given = {} if gathered is None else {f"gather_indices_{gathered}": indices}
    permuted = {name: value[order] for name, value in given.items()}
    sorted_left, sorted_right = (x if gathered == side else x[order] for x, side in ((left, "left"), (right, "right")))
    before = torch.randn(EXPERTS, 45, 101, device=device)
    expected = moe_xe.grouped_outer(sorted_left, sorted_right, torch.tensor(COUNTS, device=device), **permuted,
                                    out=before.clone() if accumulate else None, accumulate=accumulate, out_dtype=torch.float32)
    out = before.clone() if accumulate else torch.full_like(before, float("nan"))
    moe_xe.grouped_outer(left, right, within_more().to(device), **given, out=out, accumulate=accumulate)
    torch.testing.assert_close(out.cpu(), expected.cpu(), rtol=1e-5, atol=1e-4)
    if device.type == "cpu":
        again = moe_xe.grouped_outer(left, right, within_more().to(device), **given, out=before.clone() if accumulate else None,
                                     accumulate=accumulate, out_dtype=torch.float32)
        assert torch.equal(again, out)


def test_nothing_at_all(device):
    a, w = make(N, K, torch.float32, device)
    table = torch.zeros_like(TABLE).to(device)
    assert moe_xe.grouped_gemm(a, w, table, out=poisoned(len(a), N, torch.float32, device)).isnan().all()
    assert moe_xe.grouped_gemm(a[:0], w, table).shape == (0, N)
    assert not moe_xe.grouped_outer(a, a, table).any() and not moe_xe.grouped_outer(a[:0], a[:0], table).any()


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.full)])
def test_compile(dynamic, device):
    a, w = make(N, K, torch.float32, device)
    a.requires_grad_(), w.requires_grad_()

    def step(a, w, table):
        return moe_xe.grouped_gemm(a, w, table).square()[:USED].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected, found = (torch.autograd.grad(f(a, w, within_more().to(device)), (a, w)) for f in (step, compiled))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.full
def test_autotune(fresh_tuner, device):
    a, w = make(N, K, torch.float32, device)
    out = moe_xe.grouped_gemm(a, w, TABLE.to(device), autotune=True, out=poisoned(len(a), N, torch.float32, device))
    assert_right(out, a, w)


WRONG = {
    "no rank": (TABLE[:0], ValueError, r"tokens_per_expert must have a row for each rank, got int32\[0, 5\]"),
    "an expert too few": (TABLE[:, 1:], ValueError, "one entry for each of the 5 experts, got 4"),
    "counts of a rank lie apart": (TABLE.T.contiguous().T, ValueError, "tokens_per_expert must be contiguous, got stride 4"),
    "float": (TABLE.float(), TypeError, "tokens_per_expert must be int32 or int64, got torch.float32"),
    "negative": (TABLE - 3, ValueError, r"tokens_per_expert must not be negative: tokens_per_expert\[0, 1\] is -3"),
    "too many": (TABLE + 9, ValueError, f"sums to {USED + 9 * TABLE.numel()}, but there are only {USED + UNUSED} rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tables(case):
    table, error, message = WRONG[case]
    a, w = make(8, 16, torch.float32, "cpu")
    with pytest.raises(error, match=message):
        moe_xe.grouped_gemm(a, w, table, check=True)
