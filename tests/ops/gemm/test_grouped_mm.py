import pytest
import torch

import moe_xe
from moe_xe.bench.numerics import agrees

from .test_grouped_gemm import COUNTS, DTYPES, assert_right, make


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
    a, w, _, _ = make([10, 10, 10], 24, 16, torch.float32, device)
    memory = torch.full((30 + 60, 24), float("nan"), device=device)
    torch.ops.moe_xe.grouped_gemm_out(a, w, torch.tensor(offs, dtype=torch.int32, device=device), None, None, None, None, 1,
                                      memory[30:60], "ends", "dynamic", "")
    assert memory[:30].isnan().all() and memory[60:].isnan().all()


ENDS = [5, 5, 22, 30]
SLICES = [slice(begin, end) for begin, end in zip([0, *ENDS], ENDS)]
FORMS = {
    "2D x 3D": ((30, 40), (4, 40, 24), lambda a, b: torch.cat([a[s] @ w for s, w in zip(SLICES, b)])),
    "2D x 2D": ((40, 30), (30, 24), lambda a, b: torch.stack([a[:, s] @ b[s] for s in SLICES])),
    "3D x 2D": ((4, 24, 40), (40, 30), lambda a, b: torch.cat([w @ b[:, s] for s, w in zip(SLICES, a)], dim=1)),
    "3D x 3D": ((4, 9, 40), (4, 40, 24), torch.bmm),
}


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
        assert agrees(x.detach(), reference.detach(), 40)


def test_wrong_forms(device):
    a, b = torch.randn(6, 8, device=device), torch.randn(2, 8, 4, device=device)
    with pytest.raises(ValueError, match="offs must be given for a 2D x 3D"):
        moe_xe.grouped_mm(a, b)
    with pytest.raises(ValueError, match="offs must be None for a 3D x 3D"):
        moe_xe.grouped_mm(b.transpose(1, 2), b, offs=torch.tensor([1, 2], dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="mat_a must have 2 or 3 dimensions"):
        moe_xe.grouped_mm(a[0], b)
