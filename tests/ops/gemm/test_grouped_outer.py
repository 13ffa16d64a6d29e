"""The weights' gradient as users call it, against torch in float64, on every device that is there."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_xe.device import queue_for
from moe_xe.ops.calls import known_calls
from moe_xe.ops.gemm import grouped_outer as ops
from moe_xe.ops.gemm.grouped_outer import OuterCall, grouped_outer
from moe_xe.plan.outer.config import OuterGenericConfig
from moe_xe.plan.override import force_config

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = [0, 5, 300, 1, 64, 0, 17]
P, Q = 141, 203


def make(counts, p, q, dtype, device, rows=None):
    rows = sum(counts) if rows is None else rows
    return (torch.randn(rows, p, dtype=dtype, device=device), torch.randn(rows, q, dtype=dtype, device=device),
            torch.tensor(counts, dtype=torch.int32, device=device))


def reference(left, right, counts):
    left, right = left[:sum(counts)].double(), right[:sum(counts)].double()
    return torch.stack([x.T @ y for x, y in zip(left.split(counts), right.split(counts))])


def assert_right(out, expected, rows):
    """Element by element: one rounding to the type, and sums of `rows` products in float32, each of whose steps rounds what the sum is then."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * rounding + rows**0.5 * 2.0**-24, atol=2e-7 * (rows + 8))


def poisoned(*shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, device):
    left, right, rows = make(COUNTS, P, Q, dtype, device)
    out = poisoned(len(COUNTS), P, Q, dtype=dtype, device=device)
    assert grouped_outer(left, right, rows, out=out) is out
    assert_right(out, reference(left, right, COUNTS), 300)
    assert (out[[0, 5]] == 0).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_output_dtype(out_dtype, device):
    left, right, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    out = grouped_outer(left, right, rows, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_right(out, reference(left, right, COUNTS), 300)


@settings(settings.get_profile("compiling"))
@given(counts=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=12),
       p=st.integers(1, 200), q=st.integers(1, 200), dtype=st.sampled_from(DTYPES))
def test_any_shape(counts, p, q, dtype):
    left, right, rows = make(counts, p, q, dtype, "cpu")
    assert_right(grouped_outer(left, right, rows), reference(left, right, counts), max(counts))


@pytest.mark.parametrize("q", [18, pytest.param(20, marks=pytest.mark.full)])
def test_a_constant_part_of_a_vector(q, device):
    """The CPU device's compiler crashed at 2 and 4 of a vector's columns."""
    left, right, rows = make(COUNTS, 14, q, torch.bfloat16, device)
    assert_right(grouped_outer(left, right, rows), reference(left, right, COUNTS), max(COUNTS))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gathered_rows(side, dtype, device):
    left, right, rows = make(COUNTS, P, Q, dtype, device)
    indices = torch.randint(0, 3 * 50, (sum(COUNTS),), dtype=torch.int32, device=device)
    sources = indices.long() // 3
    if side == "left":
        out = grouped_outer(left[:50], right, rows, gather_indices_left=indices, gather_divisor=3)
        expected = reference(left[sources], right, COUNTS)
    else:
        out = grouped_outer(left, right[:50], rows, gather_indices_right=indices, gather_divisor=3)
        expected = reference(left, right[sources], COUNTS)
    assert_right(out, expected, 300)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate(dtype, device):
    left, right, rows = make(COUNTS, P, Q, dtype, device)
    before = torch.randn(len(COUNTS), P, Q, device=device).to(dtype)
    out = grouped_outer(left, right, rows, out=before.clone(), accumulate=True)
    assert_right(out, reference(left, right, COUNTS) + before.double(), 300)
    assert torch.equal(out[[0, 5]], before[[0, 5]])


def test_float32_gradients_of_bfloat16_rows_accumulate_in_float32(device):
    left, right, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    out = torch.zeros(len(COUNTS), P, Q, device=device)
    for _ in range(3):
        grouped_outer(left, right, rows, out=out, accumulate=True)
    assert_right(out, 3 * reference(left, right, COUNTS), 900)


def test_views_for_out(device):
    """Slices, experts apart, rows of all experts side by side."""
    left, right, rows = make(COUNTS, P, Q, torch.float32, device)
    expected = reference(left, right, COUNTS)
    for shape, view in (((9, P + 3, Q + 10), lambda whole: whole[1:8, 2:-1, 5:-5]), ((P, 7, Q), lambda whole: whole.transpose(0, 1)),
                        ((14, P, Q), lambda whole: whole[::2])):
        whole = poisoned(*shape, dtype=torch.float32, device=device)
        out = view(whole)
        grouped_outer(left, right, rows, out=out)
        assert_right(out, expected, 300)
        assert whole.isfinite().sum() == expected.numel()


def test_both_weight_layouts_by_swapping_the_operands(device):
    """The gradient of [E, N, K] weights, and of the same weights stored as [E, K, N]."""
    grad, a, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    enk, ekn = grouped_outer(grad, a, rows), grouped_outer(a, grad, rows)
    assert_right(enk, reference(grad, a, COUNTS), 300)
    assert torch.equal(enk, ekn.transpose(1, 2))
    stored = poisoned(len(COUNTS), Q, P, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="for a transposed out, swap left and right"):
        grouped_outer(grad, a, rows, out=stored.transpose(1, 2))
    grouped_outer(a, grad, rows, out=stored)
    assert torch.equal(stored, ekn)


def test_strided_operands_are_used_in_place(device):
    left, right, rows = make(COUNTS, P + 20, Q + 10, torch.bfloat16, device)
    left, right = left[:, 7:7 + P], right[:, 10:]
    assert_right(grouped_outer(left, right, rows), reference(left, right, COUNTS), 300)
    expanded = torch.ones(1, 1, dtype=torch.bfloat16, device=device).expand(sum(COUNTS), 1)
    assert_right(grouped_outer(expanded, right, rows), reference(expanded, right, COUNTS), 300)


def test_512_experts_and_int64_counts(device):
    counts = [(7 * e) % 5 for e in range(512)]
    left, right, rows = make(counts, P, Q, torch.bfloat16, device)
    assert_right(grouped_outer(left, right, rows.long()), reference(left, right, counts), 5)


@pytest.mark.parametrize("total", [0, 12])
@pytest.mark.parametrize("accumulate", [False, True])
def test_no_rows_for_any_expert(total, accumulate, device):
    """Rows may be there, but belong to nobody."""
    left, right, rows = make([0, 0, 0], P, Q, torch.bfloat16, device, rows=total)
    out = torch.full((3, P, Q), 2.0, dtype=torch.bfloat16, device=device)
    grouped_outer(left, right, rows, out=out, accumulate=accumulate)
    assert (out == (2.0 if accumulate else 0.0)).all()


@pytest.mark.parametrize("p, q", [(0, 20), (20, 0)])
def test_nothing_to_compute(p, q, device):
    left, right, rows = make([4, 3], p, q, torch.float32, device)
    assert grouped_outer(left, right, rows).shape == (2, p, q)


def test_single_rows(device):
    left, right, rows = make([1] * 20, P, Q, torch.float16, device)
    assert_right(grouped_outer(left, right, rows), left.double()[:, :, None] * right.double()[:, None, :], 1)


@pytest.mark.parametrize("counts", [[10, 2**31 - 1, 2**31 - 1, 5], [-5, 8, -(2**31), 40], [200, 200, 200, 200]])
def test_wrong_counts_touch_nothing_outside(counts, device):
    """Around the operands is NaN, which would show."""
    def guarded(columns):
        whole = poisoned(100 + 128, columns, dtype=torch.float32, device=device)
        whole[64:-64] = torch.randn(100, columns, device=device)
        return whole[64:-64]

    big = torch.full((4 + 2, P, Q), 7.0, device=device)
    grouped_outer(guarded(P), guarded(Q), torch.tensor(counts, dtype=torch.int32, device=device), out=big[1:-1])
    assert (big[[0, -1]] == 7.0).all() and big.isfinite().all()


def test_rows_beyond_the_counts_are_not_used(device):
    left, right, _ = make([30] * 3, P, Q, torch.bfloat16, device)
    left[50:] = right[50:] = float("nan")
    out = grouped_outer(left, right, torch.tensor([20, 0, 30], dtype=torch.int32, device=device))
    assert_right(out, reference(left, right, [20, 0, 30]), 30)


def test_ends_of_rows(device):
    """The form of torch's grouped_mm for two matrices."""
    left, right, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    call = OuterCall(left, right, rows.cumsum(0).int(), rows_format="ends")
    out = ops.dispatch(call, None, None, accumulate=False)
    assert torch.equal(out, grouped_outer(left, right, rows))


def test_two_runs_are_bitwise_equal_whoever_computes(device, monkeypatch):
    left, right, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    first = grouped_outer(left, right, rows)
    assert torch.equal(first, grouped_outer(left, right, rows))
    target = ops.target_of(ops.facts_of(queue_for(torch.device(device))))
    config = ops.plan(OuterCall(left, right, rows), first, False, target)[0].config
    for cores in (1, 5):
        with monkeypatch.context() as patch, force_config(config):
            patch.setattr(ops, "target_of", lambda facts: replace(target, cores=cores))
            known_calls().clear()      # of another number of cores
            assert torch.equal(first, grouped_outer(left, right, rows))


def test_few_tiles_share_rows_out(device, monkeypatch):
    """With many cores, an expert's rows are split; the parts are summed in order."""
    left, right, rows = make([1500, 0, 13], 70, 50, torch.bfloat16, device)
    target = replace(ops.target_of(ops.facts_of(queue_for(torch.device(device)))), cores=3)
    monkeypatch.setattr(ops, "target_of", lambda facts: target)
    whole = poisoned(3 * 70, 60, dtype=torch.bfloat16, device=device)
    out = whole[:, :50].unflatten(0, (3, 70))
    assert ops.plan(OuterCall(left, right, rows), out, False, target)[0].config.splits > 1
    grouped_outer(left, right, rows, out=out)
    assert_right(out, reference(left, right, [1500, 0, 13]), 1500)
    assert whole[:, 50:].isnan().all()
    assert torch.equal(out, grouped_outer(left, right, rows))
    accumulated = grouped_outer(left, right, rows, out=torch.ones(3, 70, 50, device=device), accumulate=True)
    assert_right(accumulated, reference(left, right, [1500, 0, 13]) + 1, 1500)


def test_the_generic_kernel(device):
    left, right, rows = make(COUNTS, P, Q, torch.bfloat16, device)
    with force_config(OuterGenericConfig(16, 32, 1, sub_group_rows=8, sub_group_columns=16)):
        assert_right(grouped_outer(left, right, rows), reference(left, right, COUNTS), 300)


@pytest.mark.parametrize("side", ["left", "right"])
def test_addresses_of_gathered_rows(side):
    """The table that the Xe kernel reads; an index outside is the last row, as in the other kernels."""
    operand = torch.randn(5, 40, dtype=torch.bfloat16)[:, 8:]
    indices = torch.tensor([0, 7, 14, 15, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    call = OuterCall(operand, operand, indices[:1], *((indices, None) if side == "left" else (None, indices)), 3)
    assert ops.row_addresses(call).tolist() == [operand[row].data_ptr() for row in (0, 2, 4, 4, 4, 4, 4)]


LEFT, RIGHT, ROWS = torch.randn(10, 16), torch.randn(10, 8), torch.tensor([2, 3, 5])
INDICES = torch.zeros(10, dtype=torch.int32)
WRONG = {
    "left is no tensor": (dict(left=[1.0]), TypeError, r"left must be a torch.Tensor \[total_rows, P\], got list"),
    "left has four dimensions": (dict(left=LEFT[None, None]), ValueError, "left must have 2 dimensions"),
    "left is double": (dict(left=LEFT.double()), TypeError, "left must be bfloat16, float16 or float32, got torch.float64"),
    "right has another dtype": (dict(right=RIGHT.half()), TypeError, "right must have left's dtype torch.float32, got torch.float16"),
    "right has other rows": (dict(right=RIGHT[:9]), ValueError, r"right must have as many rows as left, 10, got float32\[9, 8\]"),
    "left has other rows than indices": (dict(left=LEFT[:9], gather_indices_right=INDICES), ValueError,
                                         "left must have as many rows as gather_indices, 10"),
    "left's rows are not contiguous": (dict(left=torch.randn(16, 10).T), ValueError, "left's rows must be contiguous"),
    "right's rows are not contiguous": (dict(right=torch.randn(8, 10).T), ValueError, "right's rows must be contiguous"),
    "counts are float": (dict(tokens_per_expert=ROWS.float()), TypeError, "tokens_per_expert must be int32 or int64"),
    "both are gathered": (dict(gather_indices_left=INDICES, gather_indices_right=INDICES), ValueError, "exclude each other"),
    "left's indices are a list": (dict(gather_indices_left=[0]), TypeError, "gather_indices_left must be a torch.Tensor .* got list"),
    "right's indices are a list": (dict(gather_indices_right=[0]), TypeError, "gather_indices_right must be a torch.Tensor .* got list"),
    "right's indices are 2D": (dict(gather_indices_right=INDICES[None]), ValueError, "gather_indices_right must have 1 dimensions"),
    "indices on two devices": (dict(gather_indices_right=INDICES.to("meta")), ValueError, "gather_indices_right is on meta"),
    "indices are int64": (dict(gather_indices_left=INDICES.long()), TypeError, "gather_indices_left must be int32"),
    "nothing to gather from": (dict(right=RIGHT[:0], gather_indices_right=INDICES), ValueError, "right has no rows"),
    "the divisor is 0": (dict(gather_divisor=0), ValueError, "gather_divisor must be from 1 to 2147483647, got 0"),
    "out has another shape": (dict(out=torch.empty(3, 8, 16)), ValueError, r"out must be float32\[3, 16, 8\], got float32\[3, 8, 16\]"),
    "out has another dtype": (dict(out=torch.empty(3, 16, 8), out_dtype=torch.float16), ValueError, "out must be float16"),
    "out's rows overlap": (dict(out=torch.empty(16, 8).expand(3, 16, 8)), ValueError, "out's rows must not overlap"),
    "out's experts overlap": (dict(out=torch.empty(400).as_strided((3, 16, 8), (64, 8, 1))), ValueError, "must not overlap"),
    "out is a list": (dict(out=[1]), TypeError, "out must be a torch.Tensor"),
    "accumulate without out": (dict(accumulate=True), ValueError, "accumulate adds to out, which must be given"),
    "out_dtype is int": (dict(out_dtype=torch.int8), TypeError, "out_dtype must be bfloat16, float16 or float32"),
    "on two devices": (dict(right=RIGHT.to("meta")), ValueError, "left is on cpu, right is on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        grouped_outer(**(dict(left=LEFT, right=RIGHT, tokens_per_expert=ROWS) | changes))


def test_out_shares_memory_with_an_input():
    memory = torch.randn(1000)
    left, out = memory[:160].view(10, 16), memory[150:150 + 384].view(3, 16, 8)
    with pytest.raises(ValueError, match="out must not share memory with left"):
        grouped_outer(left, RIGHT, ROWS, out=out)


def test_misaligned_memory():
    left = torch.frombuffer(bytearray(4 * 160 + 1), dtype=torch.float32, offset=1, count=160).view(10, 16)
    with pytest.raises(ValueError, match="left must be aligned to its 4-byte elements"):
        grouped_outer(left, RIGHT, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)])
@pytest.mark.parametrize("side", [None, *(pytest.param(side, marks=pytest.mark.full) for side in ("left", "right"))])
def test_opcheck(side, dtype, device):
    left, right, rows = make(COUNTS, P, Q, dtype, device)
    indices = torch.arange(sum(COUNTS), dtype=torch.int32, device=device).flip(0)
    gathers = {None: (None, None, 1), "left": (indices, None, 3), "right": (None, indices, 1)}[side]
    arguments = (left, right, rows, *gathers, "counts", "")
    torch.library.opcheck(torch.ops.moe_xe.grouped_outer, (*arguments, dtype))
    out = torch.zeros(len(COUNTS), P, Q, dtype=dtype, device=device)
    for accumulate in (False, True):
        torch.library.opcheck(torch.ops.moe_xe.grouped_outer_out, (*arguments, out, accumulate))


def test_fake_xpu_tensors_reach_the_op():
    """On a build of torch without XPU: checks, dispatch and the output's shape, dtype and device."""
    with FakeTensorMode():
        left, right = (torch.empty(50, columns, dtype=torch.bfloat16, device="xpu") for columns in (64, 96))
        out = grouped_outer(left, right, torch.empty(4, dtype=torch.int32, device="xpu"), out_dtype=torch.float32)
    assert (out.shape, out.dtype, out.device.type) == ((4, 64, 96), torch.float32, "xpu")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_fullgraph(backend, device):
    left, right, rows = make(COUNTS, P, Q, torch.float32, device)
    out = torch.ones(len(COUNTS), P, Q, device=device)

    @torch.compile(fullgraph=True, backend=backend)
    def step(left, right, rows, out):
        grouped_outer(left, right, rows, out=out, accumulate=True)
        return grouped_outer(left, right, rows) * 2

    doubled = step(left, right, rows, out)
    expected = reference(left, right, COUNTS)
    assert_right(doubled, 2 * expected, 600)
    assert_right(out, expected + 1, 300)
