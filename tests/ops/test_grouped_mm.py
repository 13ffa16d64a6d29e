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
    assert agrees(out, expected, 144)
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
    torch.ops.moe_xe.grouped_gemm_out(a, w, torch.tensor(offs, dtype=torch.int32, device=device), None, None, None, None, 1, memory[30:60], "ends",
                                      "dynamic")
    assert memory[:30].isnan().all() and memory[60:].isnan().all()
