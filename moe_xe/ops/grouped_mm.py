"""A drop-in for torch.nn.functional.grouped_mm in its 2D x 3D form."""
from __future__ import annotations

import torch

from . import checks
from .grouped_gemm import dispatch, validate

__all__ = ["grouped_mm"]


def grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor, bias: torch.Tensor | None = None,
               out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """``out[offs[e-1]:offs[e]] = mat_a[offs[e-1]:offs[e]] @ mat_b[e] (+ bias[e])``.

    mat_a: [total_rows, K], bfloat16, float16 or float32. mat_b: [E, K, N] of the same dtype; either of its last two
    dimensions may be the contiguous one. offs: [E] int32, each expert's cumulative end. bias: [E, N]. Returns
    [total_rows, N] of out_dtype (mat_a's dtype by default); rows from offs[-1] on are undefined, as in torch.
    Raises TypeError or ValueError naming the argument.
    """
    checks.check_tensor("mat_a", mat_a, 2, "[total_rows, K] (other forms of torch's grouped_mm are not there yet)")
    checks.check_tensor("mat_b", mat_b, 3, "[E, K, N] (other forms of torch's grouped_mm are not there yet)")
    call = validate(mat_a, mat_b.transpose(1, 2), offs, bias, None, out_dtype, None, "dynamic", rows_dtypes=(torch.int32,),
                    rows_name="offs", a_name="mat_a", w_name="mat_b", rows_format="ends")
    return dispatch(call, out_dtype, None)
