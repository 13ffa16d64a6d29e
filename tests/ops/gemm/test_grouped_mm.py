import pytest
import torch

import moe_xe
from moe_xe.bench.numerics import agrees
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs

from ..tiles import K, N
from .test_grouped_gemm import COUNTS, DTYPES, assert_right, make


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_torch(dtype, transposed, device):
    a, w, rows, _ = make(COUNTS, 208, 144, dtype, device)
    mat_b = w.transpose(1, 2) if transposed else w.transpose(1, 2).contiguous()
    offs = rows.cumsum(0, dtype=torch.int32)
    out = moe_xe.grouped_mm(a, mat_b, offs=offs)
    expected = torch.nn.functional.grouped_mm(a, mat_b, offs=offs)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert agrees(out, expected, 4 * 144)       # each has roundings of its own: twice the error
    assert_right(out, a, w, COUNTS)


def test_bias_and_output_dtype(device):
    a, w, rows, b = make(COUNTS, 40, 56, torch.float16, device, torch.float16)
    out = moe_xe.grouped_mm(a, w.transpose(1, 2), offs=rows.cumsum(0, dtype=torch.int32), bias=b, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_right(out, a, w, COUNTS, b)


@pytest.mark.parametrize("offs", [[10, 5, 100], [-3, 2**31 - 1, 7], [1000, 1000, 1000]])
def test_falling_or_too_large_ends_touch_nothing_outside(offs, device):
    a, w, _, _ = make([10, 10, 10], 8, 16, torch.float32, device)
    memory = torch.full((30 + 60, 8), float("nan"), device=device)
    torch.ops.moe_xe.grouped_gemm_out(*INPUTS.flatten(Inputs(a, w, torch.tensor(offs, dtype=torch.int32, device=device))), memory[30:60],
                                      "ends", "dynamic", "")
    assert memory[:30].isnan().all() and memory[60:].isnan().all()


ENDS = [5, 5, 22, 30]
SLICES = [slice(begin, end) for begin, end in zip([0, *ENDS], ENDS)]
FORMS = {
    "2D x 3D": ((30, K), (4, K, N), lambda a, b: torch.cat([a[s] @ w for s, w in zip(SLICES, b)])),
    "2D x 2D": ((N, 30), (30, K), lambda a, b: torch.stack([a[:, s] @ b[s] for s in SLICES])),
    "3D x 2D": ((4, N, K), (K, 30), lambda a, b: torch.cat([w @ b[:, s] for s, w in zip(SLICES, a)], dim=1)),
    "3D x 3D": ((4, 9, K), (4, K, N), torch.bmm),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_all_forms_and_their_gradients(form, transposed, device):
    """transposed: both operands are views of transposed matrices."""
    a_shape, b_shape, product = FORMS[form]
    operands = [torch.randn(shape, device=device) for shape in (a_shape, b_shape)]
    if transposed:
        operands = [x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in operands]
    a, b = (x.detach().requires_grad_() for x in operands)
    offs = None if form == "3D x 3D" else torch.tensor(ENDS, dtype=torch.int32, device=device)
    out = moe_xe.grouped_mm(a, b, offs=offs)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    a64, b64 = (x.detach().double().requires_grad_() for x in operands)
    expected = product(a64, b64)
    expected.backward(gradient.double())
    for x, reference in ((out, expected), (a.grad, a64.grad), (b.grad, b64.grad)):
        assert agrees(x.detach(), reference.detach(), 30)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ones", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_strides_of_single_rows_columns_and_groups_do_not_matter(form, ones, device):
    """Dimensions of length 1 have strides that nothing is read with; the others lie in either order. ones: which of them are 1."""
    groups, m, n, k = 1 if 0 in ones else 4, 1 if 1 in ones else 5, 1 if 2 in ones else 3, 1 if len(ones) == 3 else 7
    ends, total = ([9], 9) if groups == 1 else (ENDS, ENDS[-1])
    slices = [slice(begin, end) for begin, end in zip([0, *ends], ends)]
    a_shape, b_shape, product = {
        "2D x 3D": ((total, k), (groups, k, n), lambda a, b: torch.cat([a[s] @ w for s, w in zip(slices, b)])),
        "2D x 2D": ((m, total), (total, n), lambda a, b: torch.stack([a[:, s] @ b[s] for s in slices])),
        "3D x 2D": ((groups, m, k), (k, total), lambda a, b: torch.cat([w @ b[:, s] for s, w in zip(slices, a)], dim=1)),
        "3D x 3D": ((groups, m, k), (groups, k, n), torch.bmm),
    }[form]
    offs = None if form == "3D x 3D" else torch.tensor(ends, dtype=torch.int32, device=device)
    for odd in (0, 1, 2, 1000):
        for transposed in (False, True):
            operands = []
            for shape in (a_shape, b_shape):
                x = torch.randn(shape, device=device)
                x = x.mT.contiguous().mT if transposed else x
                operands.append(x.as_strided(shape, [odd if size == 1 else stride for size, stride in zip(shape, x.stride())]))
            out = moe_xe.grouped_mm(*operands, offs=offs)
            torch.testing.assert_close(out.double(), product(*(x.double() for x in operands)), rtol=1e-5, atol=1e-5)


def test_results_can_be_viewed_flat(device):
    """Those of 3D x 2D have torch's strides, too."""
    for a_shape, b_shape, ends in (((2, 8, 16), (16, 8), [4, 8]), ((8, 16), (2, 16, 8), [4, 8]), ((8, 16), (16, 8), [4, 16]), ((2, 8, 16), (2, 16, 8), None)):
        a, b = torch.randn(a_shape, device=device), torch.randn(b_shape, device=device)
        offs = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device)
        out, expected = moe_xe.grouped_mm(a, b, offs=offs), torch.nn.functional.grouped_mm(a, b, offs=offs)
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out.view(-1), expected.view(-1), rtol=1e-4, atol=1e-4)


def test_offs_between_other_values(device):
    a, b = torch.randn(30, K, device=device), torch.randn(4, K, N, device=device)
    ends = torch.tensor(ENDS, dtype=torch.int32, device=device)
    spread = torch.stack([ends, torch.full_like(ends, 99)], dim=1)[:, 0]
    assert not spread.is_contiguous() and torch.equal(moe_xe.grouped_mm(a, b, offs=spread), moe_xe.grouped_mm(a, b, offs=ends))


def test_wrong_forms(device):
    a, b = torch.randn(6, 8, device=device), torch.randn(2, 8, 4, device=device)
    with pytest.raises(ValueError, match="offs must be given for a 2D x 3D"):
        moe_xe.grouped_mm(a, b)
    with pytest.raises(ValueError, match="offs must be None for a 3D x 3D"):
        moe_xe.grouped_mm(b.transpose(1, 2), b, offs=torch.tensor([1, 2], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="mat_a must have 2 or 3 dimensions"):
        moe_xe.grouped_mm(a[0], b)
