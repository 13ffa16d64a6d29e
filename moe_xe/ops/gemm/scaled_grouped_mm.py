"""torch.nn.functional.scaled_grouped_mm, as far as its weights are what is quantised."""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...plan.choice.block_config import GemmConfigs
from ...plan.choice.choice import Choice
from ...plan.gemm.config import TileConfig
from ...quantized import QuantizedWeight
from .. import checks
from ..plain import takes_plain_tensors
from .grouped_gemm import dispatch, validate

if TYPE_CHECKING:       # torch's since 2.10
    from torch.nn.functional import ScalingType, SwizzleType

__all__ = ["scaled_grouped_mm"]

_FP8 = torch.float8_e4m3fn, torch.float8_e5m2
_BLOCKS = {"BlockWise1x32": (1, 32), "BlockWise1x128": (1, 128), "BlockWise128x128": (128, 128)}


@takes_plain_tensors
def scaled_grouped_mm(mat_a: torch.Tensor, mat_b: torch.Tensor, scale_a: torch.Tensor | list[torch.Tensor] | None,
                      scale_recipe_a: ScalingType | list[ScalingType] | None, scale_b: torch.Tensor | list[torch.Tensor],
                      scale_recipe_b: ScalingType | list[ScalingType], swizzle_a: SwizzleType | list[SwizzleType] | None = None,
                      swizzle_b: SwizzleType | list[SwizzleType] | None = None, bias: torch.Tensor | None = None,
                      offs: torch.Tensor | None = None, output_dtype: torch.dtype | None = torch.bfloat16,
                      contraction_dim: list[int] | tuple[int, ...] = (), use_fast_accum: bool = False, *,
                      config: TileConfig | GemmConfigs | None = None, autotune: bool = False) -> torch.Tensor:
    """Group e's rows of mat_a times mat_b[e], [total_rows, N]; offs [E] int32 holds each group's cumulative end.

    mat_a: [total_rows, K], bfloat16, float16 or float32, with scale_a and scale_recipe_a None; or float8_e4m3fn or float8_e5m2, which
      bfloat16 holds exactly, with scale_a float32, [total_rows] (RowWise) or of one element (TensorWise): it multiplies the sums, and
      there is no bias.
    mat_b: [E, K, N], in place where K or N is contiguous. float8_e4m3fn or float8_e5m2: scale_b [E] (TensorWise), [E, N] (RowWise), or for
      BlockWise128x128, 1x128 and 1x32 (of this, e8m0) [E, ceil(K / bk), ceil(N / bn)], in mat_b's order. float4_e2m1fn_x2 [E, K / 2, N],
      two k in a byte: BlockWise1x32, e8m0; or [BlockWise1x16, TensorWise], float8_e4m3fn and float32 [E].
    bias: [E, N]. output_dtype: bfloat16, float16 or float32; None is bfloat16. use_fast_accum: accepted; sums are float32. config,
    autotune: as in `grouped_gemm`. Differentiable in bias and in a mat_a that is not FP8.
    Other forms and recipes, swizzled scales and a contraction_dim are a ValueError. Raises TypeError or ValueError naming the argument.
    """
    checks.check_tensor("mat_a", mat_a, 2, "[total_rows, K]")
    checks.check_tensor("mat_b", mat_b, 3, "[E, K, N]")
    for name, swizzle in (("swizzle_a", swizzle_a), ("swizzle_b", swizzle_b)):
        if set(_names(swizzle)) - {"NO_SWIZZLE"}:
            raise ValueError(f"{name} must be None or NO_SWIZZLE, got {_names(swizzle)}")
    if len(contraction_dim):
        raise ValueError(f"contraction_dim must be empty, got {contraction_dim}")
    if offs is None:
        raise ValueError("offs must be given for a 2D x 3D product, got None")
    output_dtype = torch.bfloat16 if output_dtype is None else output_dtype
    w = _weight(mat_b, _listed(scale_b), _names(scale_recipe_b))
    rows, row_scales = _rows(mat_a, _listed(scale_a), _names(scale_recipe_a))
    if bias is not None and row_scales is not None:
        raise ValueError(f"bias must be None with scale_a, got {checks.shape_of(bias)}")
    call = validate(rows, w, offs, bias, None, output_dtype, None, "dynamic", rows_dtypes=(torch.int32,), rows_name="offs", a_name="mat_a",
                    w_name="mat_b", rows_format="ends", row_scales=row_scales, choice=Choice.of(config, autotune, TileConfig, GemmConfigs))
    return dispatch(call, output_dtype, None)


def _rows(mat_a: torch.Tensor, scales: list, recipes: list) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows in a dtype that kernels have, and what each row's sums are multiplied with."""
    if mat_a.dtype not in _FP8:
        for name, given in (("scale_a", scales), ("scale_recipe_a", recipes)):
            if given:
                raise ValueError(f"{name} must be None for a mat_a that is {mat_a.dtype}, got {len(given)}")
        return mat_a, None
    if recipes not in (["RowWise"], ["TensorWise"]) or len(scales) != 1:
        raise ValueError(f"scale_recipe_a must be RowWise or TensorWise, with one scale_a, got {recipes} and {len(scales)}")
    (scale,), total_rows = scales, mat_a.shape[0]
    wanted = total_rows if recipes == ["RowWise"] else 1
    if not isinstance(scale, torch.Tensor) or scale.dtype != torch.float32 or scale.numel() != wanted:
        raise ValueError(f"scale_a must be float32 of {wanted} elements for {recipes[0]}, got "
                         f"{checks.shape_of(scale) if isinstance(scale, torch.Tensor) else type(scale).__name__}")
    return mat_a.to(torch.bfloat16), scale.reshape(-1).expand(total_rows).contiguous()


def _weight(mat_b: torch.Tensor, scales: list, recipes: list) -> QuantizedWeight:
    """[E, N, K] of scales in mat_b's order."""
    if len(scales) != len(recipes) or not all(isinstance(scale, torch.Tensor) for scale in scales):
        raise ValueError(f"scale_b must be a torch.Tensor for each of scale_recipe_b, got {[type(scale).__name__ for scale in scales]} "
                         f"for {recipes}")
    try:
        if mat_b.dtype == torch.float4_e2m1fn_x2:
            codes, scale = mat_b.view(torch.uint8).mT.contiguous(), scales[0].mT if scales and scales[0].dim() == 3 else None
            if recipes == ["BlockWise1x32"]:
                return QuantizedWeight.from_compressed_tensors(weight_packed=codes, weight_scale=scale)
            if recipes == ["BlockWise1x16", "TensorWise"]:
                return QuantizedWeight.from_modelopt(codes, scale, scales[1])
        elif mat_b.dtype in _FP8 and len(recipes) == 1:
            if recipes[0] in ("TensorWise", "RowWise"):
                return QuantizedWeight.from_fp8(mat_b, scales[0], "ekn")
            if recipes[0] in _BLOCKS:
                return QuantizedWeight.from_fp8_block(mat_b, scales[0], _BLOCKS[recipes[0]], "ekn")
    except (TypeError, ValueError) as error:
        raise type(error)(f"mat_b, scale_b: {error}") from None
    raise ValueError(f"scale_recipe_b must be one that mat_b's dtype {mat_b.dtype} can have, got {recipes}")


def _listed(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _names(kinds) -> list[str]:
    """Of torch's enumerations."""
    return [kind.name if hasattr(kind, "name") else str(kind) for kind in _listed(kinds)]
