"""Rows to int8 codes, against float64: the nearest codes, and scales that the codes are for."""
from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_xe import quantize_rows

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def check(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    x, codes, scales = (tensor.cpu() for tensor in (x, codes, scales))
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, x.shape, F32, x.shape[:1])
    wanted = x.double().abs().amax(1).clamp(min=2**-100) / 127
    assert ((scales - wanted).abs() <= 3e-7 * wanted).all()
    exact = x.double() / wanted[:, None]
    assert (codes - exact).abs().max() <= 0.5 + 1e-4        # a tie, or nearly one, is rounded to either side
    assert (codes.double().abs().amax(1) == 127 * (x != 0).any(1)).all()


@pytest.mark.parametrize("dtype, rows, columns", [(BF16, 31, 70), (F32, 3, 517), *(pytest.param(*case, marks=pytest.mark.full) for case in [
    (F16, 200, 96), (BF16, 1, 1), (F32, 7, 2880)])], ids=str)
def test_codes(dtype, rows, columns, device):
    """Rows of very different sizes, one of zeros; a matrix that is wider."""
    wide = torch.full((rows, columns + 8), float("nan"), dtype=dtype)
    wide[:, :columns] = torch.randn(rows, columns) * 2.0 ** torch.randint(-9, 9, (rows, 1))
    wide[rows // 2, :columns] = 0 if rows > 1 else 1
    x = wide.to(device)[:, :columns]
    check(x, *quantize_rows(x))


def test_numbers_that_are_none(device):
    x = torch.randn(4, 33)
    x[1, 32], x[2, 0] = float("nan"), float("-inf")
    codes, scales = quantize_rows(x.to(device))
    assert scales.cpu()[1].isnan() and scales.cpu()[2].isinf()
    check(x[::3], codes.cpu()[::3], scales.cpu()[::3])


def test_what_torch_sees(device):
    x = torch.randn(5, 40, dtype=BF16, device=device)
    torch.library.opcheck(torch.ops.moe_xe.quantize_rows, (x,))
    with FakeTensorMode():
        codes, scales = quantize_rows(torch.empty(50, 64, dtype=BF16, device="xpu"))
    assert (codes.shape, codes.dtype, scales.shape, scales.dtype, scales.device.type) == ((50, 64), torch.int8, (50,), F32, "xpu")
    assert [tensor.shape for tensor in quantize_rows(x[:0])] == [(0, 40), (0,)]


def test_bad_input():
    x = torch.randn(6, 8)
    for x, error, message in (
            (x.int(), TypeError, "x must be bfloat16, float16 or float32, got torch.int32"), (x[0], ValueError, r"x must have 2 dimensions \[rows, K\]"),
            (x.T, ValueError, "x's rows must be contiguous"),
            (x[:, :0], ValueError, r"x must have columns, got float32\[6, 0\]"), (x.clone().requires_grad_(), ValueError, "x must not require a gradient")):
        with pytest.raises(error, match=message):
            quantize_rows(x)
