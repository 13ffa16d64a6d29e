"""quantize_rows' BMG machine code, executed by xesim; memory around the operands is unmapped there."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_xe.isa.listing import summarize
from moe_xe.jit.quantize_rows_source import quantize_rows_source
from moe_xe.ops.checks import DTYPES
from moe_xe.plan.block.activate import QuantizeRowsProblem, activate_groups
from moe_xe.plan.problem import Dtype

from ..ops.block.test_activate import POISON, strided
from ..ops.gemm.test_quantize_rows import check
from .case import missing
from .test_token_sort_xesim import build, run

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype, size, columns", [(BF16, 520, 8), (F32, 37, 1), *(pytest.param(*case, marks=pytest.mark.full) for case in [
    (F16, 50, 2), (BF16, 2888, 8), (F32, 516, 4)])])
def test_codes(dtype, size, columns):
    """Rows of one sub-group and of several; one of zeros."""
    x = strided(torch.randn(5, size).to(dtype), 8)
    x[2] = 0
    codes = np.full((5, size + 16), 99, "i1")
    scales = np.full(5, POISON, "f4")
    problem = QuantizeRowsProblem(size, DTYPES[dtype], columns)
    memory = x._base.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    run(quantize_rows_source(problem, isa=None), *activate_groups(problem, 5, is_cpu=False, cores=20),
        [memory, np.int64(x.stride(0)), codes, np.int64(size + 16), scales, np.int64(5)], seed=size)
    assert (codes[:, size:] == 99).all(), "written between rows"
    check(x, torch.from_numpy(codes[:, :size]), torch.from_numpy(scales))


@pytest.mark.few(2)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
def test_no_spills(device):
    summary = summarize(build(quantize_rows_source(QuantizeRowsProblem(2880, Dtype.bf16, 8), isa=None), device), "quantize_rows")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
