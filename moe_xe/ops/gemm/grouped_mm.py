"""A drop-in for torch.nn.functional.grouped_mm, with gradients."""
from __future__ import annotations

import torch

from ...plan.choice.block_config import GemmConfigs
from ...plan.choice.choice import Choice
from ...plan.gemm.config import TileConfig
from ...plan.outer.config import OuterConfig
from .. import checks
from ..autocast import autocast
from ..eager import repeats
from ..plain import takes_plain_tensors
from .grouped_gemm import dispatch, validate
from .grouped_outer import OuterCall, dispatch as dispatch_outer, validate as validate_outer

__all__ = ["grouped_mm"]


@repeats
@takes_plain_tensors
def grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, *, offs: torch.Tensor | None = None, bias: torch.Tensor | None = None,
               out_dtype: torch.dtype | None = None, config: TileConfig | GemmConfigs | OuterConfig | None = None,
               autotune: bool = False) -> torch.Tensor:
    """Matrix products of groups, in torch's four forms; offs [E] int32 holds each group's cumulative end.

    2D x 3D: mat_a [total_rows, K], mat_b [E, K, N] -> [total_rows, N], group e's rows of mat_a times mat_b[e].
    2D x 2D: mat_a [M, total], mat_b [total, N] -> [E, M, N], group e's columns of mat_a times its rows of mat_b.
    3D x 2D: mat_a [E, M, K], mat_b [K, total] -> [M, total], mat_a[e] times group e's columns of mat_b; its transposed is what
      is computed, and copied.
    3D x 3D: mat_a [E, M, K], mat_b [E, K, N] -> [E, M, N]; without offs.

    bfloat16, float16 or float32, both alike. Of a 3D matrix either of the last two dimensions may be the contiguous one; a 2D
    one is read in place where its groups are runs of contiguous rows, else copied. bias: [E, N], for 2D x 3D only.
    Rows or columns from offs[-1] on are undefined, as in torch. out_dtype: mat_a's by default. config, autotune: as in
    `grouped_gemm`, an OuterConfig for 2D x 2D. Differentiable, any number of times. Under torch.autocast both are cast to its dtype.
    Raises TypeError or ValueError naming the argument.
    """
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        if not isinstance(mat, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(mat).__name__}")
        checks.check_dense(name, mat)
        if mat.dim() not in (2, 3):
            raise ValueError(f"{name} must have 2 or 3 dimensions, got {checks.shape_of(mat)}")
    if offs is not None:
        checks.check_tensor("offs", offs, 1, "[E]")
        offs = offs.contiguous()
    mat_a, mat_b = autocast(mat_a, mat_b)
    form = mat_a.dim(), mat_b.dim()
    if (offs is None) != (form == (3, 3)):
        raise ValueError(f"offs must be {'None' if form == (3, 3) else 'given'} for a {form[0]}D x {form[1]}D product, "
                         f"got {offs if offs is None else checks.shape_of(offs)}")
    if bias is not None and form != (2, 3):
        raise ValueError(f"bias must be None for a {form[0]}D x {form[1]}D product")
    if form == (2, 2):
        return _products_of_columns(mat_a, mat_b, offs, out_dtype, Choice.of(config, autotune, OuterConfig))
    choice = Choice.of(config, autotune, TileConfig, GemmConfigs)
    if form == (3, 3):
        return _batched(mat_a, mat_b, out_dtype, choice)
    if form == (3, 2):      # the transposed of a 2D x 3D product
        swapped = _rows_by_weights(_with_rows(mat_b.T), mat_a, offs, None, out_dtype, "mat_b", "mat_a", choice)
        return swapped.T.contiguous()
    return _rows_by_weights(_with_rows(mat_a), mat_b.transpose(1, 2), offs, bias, out_dtype, "mat_a", "mat_b", choice)


def _with_rows(mat: torch.Tensor) -> torch.Tensor:
    """The 2D matrix with contiguous rows; a copy if need be."""
    return mat if mat.stride(1) == 1 or mat.shape[1] <= 1 else mat.contiguous()


def _rows_by_weights(rows, w, offs, bias, out_dtype, rows_name: str, w_name: str, choice: Choice) -> torch.Tensor:
    call = validate(rows, w, offs, bias, None, out_dtype, None, "dynamic", rows_dtypes=(torch.int32,), rows_name="offs",
                    a_name=rows_name, w_name=w_name, rows_format="ends", choice=choice)
    return dispatch(call, out_dtype, None)


def _products_of_columns(mat_a, mat_b, offs, out_dtype, choice: Choice) -> torch.Tensor:
    call = OuterCall(_with_rows(mat_a.T), _with_rows(mat_b), offs, rows_format="ends", choice=choice)
    validate_outer(call, out_dtype, None, False, rows_dtypes=(torch.int32,), left_name="mat_a", right_name="mat_b", rows_name="offs")
    return dispatch_outer(call, out_dtype, None, False)


def _batched(mat_a, mat_b, out_dtype, choice: Choice) -> torch.Tensor:
    (groups, m, k), n = mat_a.shape, mat_b.shape[2]
    if mat_b.shape[0] != groups:
        raise ValueError(f"mat_a and mat_b must have as many groups, got {checks.shape_of(mat_a)} and {checks.shape_of(mat_b)}")
    ends = mat_a.new_full((groups,), m, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out = _rows_by_weights(_with_rows(mat_a.reshape(groups * m, k)), mat_b.transpose(1, 2), ends, None, out_dtype, "mat_a", "mat_b", choice)
    return out.view(groups, m, n)
