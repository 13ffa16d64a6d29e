"""SGLang's fused_experts for Intel GPUs (sgl_kernel's) on moe_xe's kernels; neither SGLang nor its kernels are needed."""
from __future__ import annotations

import torch

from ..ops import checks
from ..ops.block.fused_moe import fused_moe
from ..ops.weights import Weight
from ..quantized import QuantizedWeight
from .arguments import check_bias, check_weight, check_weight_shape, named

__all__ = ["fused_experts"]

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_tanh", "relu2": "relu2"}


def fused_experts(hidden_states: torch.Tensor, w1: Weight, w2: Weight, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
                  b1: torch.Tensor | None = None, b2: torch.Tensor | None = None, inplace: bool = False, activation: str = "silu",
                  use_fp8_w8a8: bool = False, use_mxfp4_w4a16: bool = False, use_int4_w4a16: bool = False,
                  w1_scale: torch.Tensor | None = None, w2_scale: torch.Tensor | None = None, w1_zp: torch.Tensor | None = None,
                  w2_zp: torch.Tensor | None = None, w1_g_idx_perm: torch.Tensor | None = None, w2_g_idx_perm: torch.Tensor | None = None,
                  a1_scale: torch.Tensor | None = None, a2_scale: torch.Tensor | None = None, block_shape: list[int] | None = None,
                  no_combine: bool = False, routed_scaling_factor: float | None = None, gemm1_alpha: float | None = None,
                  gemm1_limit: float | None = None, swiglu_limit: float | None = None, *, autotune: bool = False) -> torch.Tensor:
    """The weighted sum of every token's experts, [T, H]; written to hidden_states if inplace.

    hidden_states: [T, H], bfloat16, float16 or float32. w1: [E, 2I, H], gates first ([E, I, H] for relu2); w2: [E, H, I]; of its dtype, or
      `QuantizedWeight`s, or tensors of a format below, read in place. b1: [E, 2I], b2: [E, H]. topk_weights, topk_ids: [T, k].
    use_int4_w4a16: uint8 or int8 [E, N, K / 2], with scales [E, N, K / g]. Without zero points codes are two's complement; w1_zp and w2_zp,
      as the scales, say what code of 0 to 15 is zero. use_mxfp4_w4a16: the same with e8m0 scales [E, N, K / 32], uint8 or float8_e8m0fnu.
    use_fp8_w8a8: float8_e4m3fn or float8_e5m2 [E, N, K], with a scale for each expert, [E], or for each block of block_shape,
      [E, ceil(N / bn), ceil(K / bk)]. As in sgl_kernel on Xe2, only weights are FP8: activations stay as they are.
    activation: "silu", "gelu" (by tanh) or "relu2". gemm1_alpha and gemm1_limit, with silu: gpt-oss' SwiGLU, gates in even rows of w1, ups
      in odd ones. swiglu_limit, with silu: gates are cut at most to it, up values to [-limit, limit].
    routed_scaling_factor: multiplies the sum. autotune: as in `fused_moe`; not an argument of sgl_kernel's.
    w1_g_idx_perm, w2_g_idx_perm (act-order), a1_scale, a2_scale (quantised activations) and no_combine are a ValueError.
    Raises TypeError or ValueError naming the argument.
    """
    refused = dict(w1_g_idx_perm=w1_g_idx_perm, w2_g_idx_perm=w2_g_idx_perm, a1_scale=a1_scale, a2_scale=a2_scale)
    for name, value in refused.items():
        if value is not None:
            why = "act-order is" if name.endswith("perm") else "quantised activations are"
            raise ValueError(f"{name} must be None, got a {type(value).__name__}: {why} not supported")
    if no_combine:
        raise ValueError(f"no_combine must be False, got {no_combine!r}: experts' rows are summed where they are computed")
    flags = dict(use_fp8_w8a8=use_fp8_w8a8, use_mxfp4_w4a16=use_mxfp4_w4a16, use_int4_w4a16=use_int4_w4a16)
    given = [name for name, flag in flags.items() if flag]
    if len(given) > 1:
        raise ValueError(f"{given[1]} must be False with {given[0]}, got True")
    format = given[0] if given else None
    if block_shape is not None and not use_fp8_w8a8:
        raise ValueError(f"block_shape must be None without use_fp8_w8a8, got {block_shape!r}")
    w1, w2 = _weight("w1", w1, w1_scale, w1_zp, format, block_shape), _weight("w2", w2, w2_scale, w2_zp, format, block_shape)
    options = _activation(activation, gemm1_alpha, gemm1_limit, swiglu_limit)
    check_weight("w1", w1, "[E, 2I, H]")
    check_weight("w2", w2, "[E, H, I]")
    num_experts, hidden_size, intermediate_size = w2.shape
    expected = [num_experts, intermediate_size * (1 if activation == "relu2" else 2), hidden_size]
    check_weight_shape("w1", w1, expected, "w2", w2, f" and {activation}")
    check_bias("b1", b1, expected[:2])
    check_bias("b2", b2, [num_experts, hidden_size])
    if routed_scaling_factor is not None:
        options["routed_scaling_factor"] = routed_scaling_factor
    out = fused_moe(hidden_states, w1, w2, topk_weights, topk_ids, b13=b1, b2=b2, autotune=autotune, **options)
    return hidden_states.copy_(out) if inplace else out


def _weight(name: str, w, scale, zero_points, format: str | None, block_shape) -> Weight:
    if format is None or isinstance(w, QuantizedWeight):
        for argument, value in ((f"{name}_scale", scale), (f"{name}_zp", zero_points)):
            if value is not None:
                raise ValueError(f"{argument} must be None for a {'QuantizedWeight' if format else 'weight of no format'}, "
                                 f"got a {type(value).__name__}")
        return w
    if scale is None:
        raise TypeError(f"{name}_scale must be a torch.Tensor with {format}, got None")
    if zero_points is not None and format != "use_int4_w4a16":
        raise ValueError(f"{name}_zp must be None with {format}, got a {type(zero_points).__name__}")
    checks.check_tensor(name, w, 3, "[E, N, K]" if format == "use_fp8_w8a8" else "[E, N, K / 2]")
    with named(name, f"{name}_scale", *([] if zero_points is None else [f"{name}_zp"])):
        if format == "use_fp8_w8a8":
            return QuantizedWeight.from_fp8(w, scale) if block_shape is None else QuantizedWeight.from_fp8_block(w, scale, block_shape)
        if w.dtype not in (torch.uint8, torch.int8):
            raise TypeError(f"weights must be uint8 or int8, got {w.dtype}")
        codes = w.view(torch.uint8)
        if format == "use_mxfp4_w4a16":
            return QuantizedWeight(codes, scale, format="mxfp4")
        checks.check_tensor("scales", scale, 3, "[E, N, K / g]")
        columns = 2 * codes.shape[2] // max(scale.shape[2], 1)
        return QuantizedWeight(codes, scale, zero_points, format="int4" if zero_points is None else "uint4", group=(1, max(columns, 1)))


def _activation(activation, gemm1_alpha, gemm1_limit, swiglu_limit) -> dict:
    """fused_moe's arguments."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    for name, value in dict(gemm1_alpha=gemm1_alpha, gemm1_limit=gemm1_limit, swiglu_limit=swiglu_limit).items():
        if value is not None and activation != "silu":
            raise ValueError(f"{name} must be None with {activation}, got {value!r}")
    if gemm1_alpha is not None:
        if gemm1_limit is None or swiglu_limit is not None:
            wrong = ("gemm1_limit must be given", gemm1_limit) if gemm1_limit is None else ("swiglu_limit must be None", swiglu_limit)
            raise ValueError(f"{wrong[0]} with gemm1_alpha, got {wrong[1]!r}")
        return dict(activation="swiglu_oai", alpha=gemm1_alpha, limit=gemm1_limit, interleaved=True)
    if gemm1_limit is not None:
        raise ValueError(f"gemm1_limit must be None without gemm1_alpha, got {gemm1_limit!r}")
    return dict(activation=_ACTIVATIONS[activation], limit=swiglu_limit)
