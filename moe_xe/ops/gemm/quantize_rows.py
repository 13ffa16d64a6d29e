"""Rows of activations as int8 codes with a scale each."""
from __future__ import annotations

import torch

from ...device import facts_of
from ...jit import compile_kernel
from ...jit.quantize_rows_source import quantize_rows_source
from ...plan.block.activate import MAX_ROWS, QuantizeRowsProblem, activate_groups, lane_columns
from ...plan.problem import MAX_COLUMNS
from .. import checks
from ..checks import A_DTYPES, DTYPES, row_stride
from ..launch import target_of
from ..library import define
from ..plain import takes_plain_tensors
from ..submission import Submission

__all__ = ["launch_quantize_rows", "quantize_rows"]


@takes_plain_tensors
def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scales of rows: ``scale = amax / 127``, and codes are the nearest to ``x / scale``; amax is the row's largest magnitude,
    or 2^-100 where that is less.

    x: [rows, K], bfloat16, float16 or float32, rows contiguous. A row with a NaN or an infinity has that as its scale, and any codes.

    Returns codes, int8 [rows, K], and scales, float32 [rows]: a and a_scales of `grouped_gemm`. Has no gradient. Raises TypeError or
    ValueError naming the argument.
    """
    checks.check_tensor("x", x, 2, "[rows, K]")
    checks.check_dtype("x", x.dtype)
    checks.check_same_device(x=x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x must not require a gradient, which codes have none for: call it under torch.no_grad()")
    if not checks.holds(x.shape[1] > 0):
        raise ValueError(f"x must have columns, got {checks.shape_of(x)}")
    if not checks.holds(x.shape[0] <= MAX_ROWS) or not checks.holds(x.shape[1] <= MAX_COLUMNS):
        raise ValueError(f"x must have at most {MAX_ROWS} rows and {MAX_COLUMNS} columns, got {checks.shape_of(x)}")
    row_stride("x", x)
    return torch.ops.moe_xe.quantize_rows(x)


def launch_quantize_rows(submission: Submission, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Submits the kernel that fills codes and scales; the arguments are checked ones."""
    rows, size = x.shape
    if rows == 0:
        return
    checks.check_addresses(x=x)
    places = [(tensor.data_ptr(), row_stride(name, tensor)) for name, tensor in (("x", x), ("codes", codes))]
    dtypes = DTYPES[x.dtype], A_DTYPES[codes.dtype]
    target = target_of(facts_of(submission.queue))
    columns = 1 if target.is_cpu else lane_columns(size, [(*place, dtype) for place, dtype in zip(places, dtypes)])
    problem = QuantizeRowsProblem(size, dtypes[0], columns)
    submission.keep(x, codes, scales)
    kernel = compile_kernel(submission.queue, quantize_rows_source(problem, target.isa))
    submission.launch(kernel, *activate_groups(problem, rows, target.is_cpu, target.cores), (*places[0], *places[1], scales.data_ptr(), rows))


def _quantize_rows(submission, x):
    codes, scales = submission.result(*x.shape, dtype=torch.int8), submission.result(x.shape[0], dtype=torch.float32)
    launch_quantize_rows(submission, x, codes, scales)
    return codes, scales


def _fake(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


define("quantize_rows", "(Tensor x) -> (Tensor, Tensor)", _quantize_rows, fake=_fake)
