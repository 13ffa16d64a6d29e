"""Each wrong argument gets an error that names it, what it was and what was expected, before anything is launched."""
import pytest
import torch

import moe_xe
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs

A, W, ROWS = torch.randn(10, 16), torch.randn(3, 8, 16), torch.tensor([2, 3, 5])

WRONG = {
    "a is no tensor": (dict(a=[1.0]), TypeError, r"a must be a torch.Tensor \[total_rows, K\], got list"),
    "a has four dimensions": (dict(a=A[None, None]), ValueError, r"a must have 2 dimensions .* got float32\[1, 1, 10, 16\]"),
    "a is double": (dict(a=A.double()), TypeError, "a must be bfloat16, float16 or float32, got torch.float64"),
    "a is sparse": (dict(a=A.to_sparse()), TypeError, "a must be a dense tensor"),
    "a's rows are not contiguous": (dict(a=torch.randn(16, 10).T), ValueError, r"a's rows must be contiguous .* strides \(1, 10\)"),
    "w has two dimensions": (dict(w=W[0]), ValueError, r"w must have 3 dimensions \[E, N, K\], got float32\[8, 16\]"),
    "w has another dtype": (dict(w=W.bfloat16()), TypeError, "w must have a's dtype torch.float32, got torch.bfloat16"),
    "w has another K": (dict(w=W[:, :, :15]), ValueError, r"agree in K: a is float32\[10, 16\] \(K = 16\), w has K = 15 and N = 8"),
    "w has no contiguous dimension": (dict(w=torch.randn(3, 16, 32)[:, ::2, ::2]), ValueError, "w must be contiguous in its last"),
    "unknown layout": (dict(weight_layout="nk"), ValueError, "weight_layout must be .* got 'nk'"),
    "counts are float": (dict(tokens_per_expert=ROWS.float()), TypeError, "tokens_per_expert must be int32 or int64, got torch.float32"),
    "counts are too few": (dict(tokens_per_expert=ROWS[:2]), ValueError, "one entry for each of the 3 experts, got 2"),
    "counts are strided": (dict(tokens_per_expert=torch.tensor([2, 0, 3, 0, 5])[::2]), ValueError, "must be contiguous, got stride 2"),
    "counts are 3D": (dict(tokens_per_expert=ROWS[None, None]), ValueError, "tokens_per_expert must have 1 dimensions"),
    "counts are negative": (dict(tokens_per_expert=torch.tensor([2, -1, 5])), ValueError, r"tokens_per_expert\[1\] is -1"),
    "counts exceed the rows": (dict(tokens_per_expert=torch.tensor([2, 4, 5])), ValueError, "sums to 11, but there are only 10 rows"),
    "bias has another shape": (dict(bias=torch.zeros(3, 7)), ValueError, r"bias must be \[E, N\] = \[3, 8\], got \[3, 7\]"),
    "bias is int": (dict(bias=torch.zeros(3, 8, dtype=torch.int32)), TypeError, "bias must be bfloat16, float16 or float32"),
    "indices are int64": (dict(gather_indices=torch.zeros(10, dtype=torch.int64)), TypeError, "gather_indices must be int32"),
    "an index is out of range": (dict(gather_indices=torch.tensor([0, 10], dtype=torch.int32), tokens_per_expert=torch.tensor([1, 1, 0])),
                                 ValueError, r"must lie in \[0, 10\), but gather_indices\[1\] is 10"),
    "nothing to gather from": (dict(a=A[:0], gather_indices=torch.zeros(2, dtype=torch.int32)), ValueError, "a has no rows"),
    "out has another shape": (dict(out=torch.empty(10, 9)), ValueError, r"out must be float32\[10, 8\], got float32\[10, 9\]"),
    "out has another dtype": (dict(out=torch.empty(10, 8), out_dtype=torch.float16), ValueError, "out must be float16"),
    "out's rows overlap": (dict(out=torch.empty(8).expand(10, 8)), ValueError, "out's rows must not overlap"),
    "out_dtype is int": (dict(out_dtype=torch.int8), TypeError, "out_dtype must be bfloat16, float16 or float32, got torch.int8"),
    "unknown schedule": (dict(schedule="guided"), ValueError, "schedule must be .* got 'guided'"),
    "values of a meta tensor": (dict(a=A.to("meta"), w=W.to("meta"), tokens_per_expert=ROWS.to("meta")), ValueError,
                                "check=True looks at tokens_per_expert's values, but a meta tensor has none"),
    "counts whose sum wraps": (dict(tokens_per_expert=torch.full((3,), 2**62)), ValueError, f"sums to {3 * 2**62}, but there are only 10"),
    "on two devices": (dict(w=W.to("meta")), ValueError, "a is on cpu, w is on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_grouped_gemm(case):
    changes, error, message = WRONG[case]
    arguments = dict(a=A, w=W, tokens_per_expert=ROWS, check=True) | changes
    with pytest.raises(error, match=message):
        moe_xe.grouped_gemm(**arguments)


@pytest.mark.parametrize("name", ["a", "w"])
def test_out_overlaps_an_input(name):
    memory = torch.randn(3 * 8 * 16 + 200)
    a, w = memory[:160].view(10, 16), memory[160:160 + 384].view(3, 8, 16)
    out = torch.as_strided(memory, (10, 8), (8, 1), 100 if name == "a" else 200)
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        moe_xe.grouped_gemm(a, w, ROWS, out=out)


def test_misaligned_memory():
    a = torch.frombuffer(bytearray(4 * 160 + 1), dtype=torch.float32, offset=1, count=160).view(10, 16)
    with pytest.raises(ValueError, match="a must be aligned to its 4-byte elements, got address 0x.*call .clone"):
        moe_xe.grouped_gemm(a, W, ROWS)


def test_slices_of_one_matrix_do_not_overlap():
    memory = torch.randn(10, 24)
    expected = moe_xe.grouped_gemm(memory[:, :16].clone(), W, ROWS)
    out = memory[:, 16:]
    assert torch.equal(moe_xe.grouped_gemm(memory[:, :16], W, ROWS, out=out), expected)


def test_grouped_mm_names_its_own_arguments():
    with pytest.raises(ValueError, match="mat_a and mat_b must agree in K"):
        moe_xe.grouped_mm(A, W, offs=ROWS.int())
    with pytest.raises(TypeError, match="offs must be int32, got torch.int64"):
        moe_xe.grouped_mm(A, W.transpose(1, 2), offs=ROWS)
    with pytest.raises(ValueError, match="mat_b must have as many rows as mat_a"):
        moe_xe.grouped_mm(A, W[0], offs=ROWS.int())


def test_out_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"out must be a torch.Tensor \[total_rows, N\], got list"):
        moe_xe.grouped_gemm(A, W, ROWS, out=[1.0])


@pytest.mark.parametrize("name", ["out", "a", "w", "bias", "row_scales"])
def test_out_has_no_gradient(name):
    """As torch.mm(out=): neither may what is written to ask for one, nor what is read; under no_grad both may."""
    tensors = dict(a=A.clone(), w=W.clone(), bias=torch.zeros(3, 8), row_scales=torch.ones(10), out=torch.empty(10, 8))
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"out must be left out where a gradient is asked for, but {name} requires one"):
        moe_xe.grouped_gemm(tokens_per_expert=ROWS, **tensors)
    with torch.no_grad():
        assert torch.equal(moe_xe.grouped_gemm(tokens_per_expert=ROWS, **tensors), moe_xe.grouped_gemm(A, W, ROWS))     # no bias, factors of 1


@pytest.mark.parametrize("name", ["out", "left", "right"])
def test_out_of_grouped_outer_has_no_gradient(name):
    tensors = dict(left=A.clone(), right=torch.randn(10, 8), out=torch.zeros(3, 16, 8))
    tensors[name].requires_grad_()
    for accumulate in (False, True):
        with pytest.raises(ValueError, match=f"out must be left out where a gradient is asked for, but {name} requires one"):
            moe_xe.grouped_outer(tokens_per_expert=ROWS, accumulate=accumulate, **tensors)
    with torch.no_grad():
        moe_xe.grouped_outer(tokens_per_expert=ROWS, **tensors)


def misaligned(*values):
    memory = torch.frombuffer(bytearray(4 * len(values) + 1), dtype=torch.int32, offset=1, count=len(values))
    return memory.copy_(torch.tensor(values))


def test_messages_name_what_the_user_passed():
    """Also those about addresses, which the op itself has to look at."""
    bt, indices = W.transpose(1, 2), misaligned(*range(10))
    for call, name in ((lambda: moe_xe.grouped_mm(A, bt, offs=misaligned(2, 5, 10)), "offs"),
                       (lambda: moe_xe.grouped_mm(A.T, A, offs=misaligned(2, 5, 10)), "offs"),
                       (lambda: moe_xe.grouped_gemm(A, W, misaligned(2, 3, 5)), "tokens_per_expert"),
                       (lambda: moe_xe.grouped_gemm(A, W, ROWS, gather_indices=indices), "gather_indices"),
                       (lambda: moe_xe.grouped_gemm(A, W, ROWS, scatter_indices=indices), "scatter_indices"),
                       (lambda: moe_xe.grouped_outer(A, A, ROWS, gather_indices_left=indices), "gather_indices_left"),
                       (lambda: moe_xe.grouped_outer(A, A, ROWS, gather_indices_right=indices), "gather_indices_right")):
        with pytest.raises(ValueError, match=f"^{name} must be aligned to its 4-byte elements"):
            call()
    for offs in ([2, 5, 10], A[:3, 0], A[:3].int()):
        with pytest.raises((TypeError, ValueError), match="^offs must"):
            moe_xe.grouped_mm(A, bt, offs=offs)
    with pytest.raises(ValueError, match="offs must have one entry for each of the 3 experts, got 2"):
        moe_xe.grouped_mm(A, bt, offs=ROWS[:2].int())


def test_ops_check_dtypes_as_the_functions_do():
    """float32 memory is not read as anything else, whoever calls."""
    with pytest.raises(TypeError, match="right must have left's dtype torch.float32, got torch.bfloat16"):
        torch.ops.moe_xe.grouped_outer(A, A.bfloat16(), ROWS, None, None, 1, "counts", "", torch.float32)
    with pytest.raises(TypeError, match="w must have a's dtype torch.float32, got torch.float16"):
        torch.ops.moe_xe.grouped_gemm(*INPUTS.flatten(Inputs(A, W.half(), ROWS)), torch.float32, "counts", "dynamic", "", False)
