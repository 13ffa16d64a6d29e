"""compressed-tensors' weights, by the names of its parameters."""
from __future__ import annotations

import torch

from . import checkpoints
from .checks import check_dtype, check_group, check_shape, check_tensor, scale_type, shape_of
from .words import bytes_of_words, numbers_of_words

__all__ = ["from_compressed_tensors"]


def from_compressed_tensors(cls, *, weight_scale: torch.Tensor, weight_packed: torch.Tensor | None = None,
                            weight: torch.Tensor | None = None, weight_shape: torch.Tensor | None = None,
                            weight_zero_point: torch.Tensor | None = None, weight_global_scale: torch.Tensor | None = None,
                            weight_g_idx: torch.Tensor | None = None, block: tuple[int, int] = (128, 128)):
    """compressed-tensors' parameters; their dtypes say the format. Only packed codes of 8 bits, or of no whole words, are copied.

    pack-quantized: weight_packed int32 [E, N, ceil(K * bits / 32)], weight_shape [2] or [E, 2], (N, K), weight_scale [E, N, K / g], and
      weight_zero_point int32 [E, ceil(N * bits / 32), K / g], or int8 [E, N, K / g] -> uint4 or int8, without zeros if all are the middle.
    int-quantized: weight int8 [E, N, K], weight_zero_point int8. float-quantized: weight float8_e4m3fn -> fp8_e4m3, or mxfp8 with e8m0
      scales of 32. weight_scale: [E], [E, 1], [E, N, 1], [E, N, K / g], or [E, ceil(N / bn), ceil(K / bk)] with block = (bn, bk).
    mxfp4-pack-quantized: weight_packed uint8 [E, N, K / 2], weight_scale uint8 or float8_e8m0fnu [E, N, K / 32].
    nvfp4-pack-quantized: the same with float8_e4m3fn [E, N, K / 16], and weight_global_scale float32 [E], which divides: its reciprocal is
      kept. weight_g_idx: [E, K], only k // g. Activations' scales are not needed: activations are never quantised.
    """
    if (weight_packed is None) == (weight is None):
        raise ValueError(f"weight_packed or weight must be given, got {'both' if weight is not None else 'neither'}")
    name, codes = ("weight", weight) if weight_packed is None else ("weight_packed", weight_packed)
    codes = checkpoints.experts_of(name, codes, 3, "[E, N, K]" if weight_packed is None else "[E, N, ..]")
    check_dtype(name, codes, *((torch.int32, torch.uint8) if weight_packed is not None else (torch.int8, torch.float8_e4m3fn)))
    if codes.dtype == torch.uint8:
        _check_absent(f"weight_packed {codes.dtype}", weight_zero_point=weight_zero_point, weight_g_idx=weight_g_idx)
        return _fp4(cls, codes, weight_scale, weight_global_scale)
    _check_absent(f"{name} {codes.dtype}", weight_global_scale=weight_global_scale)
    if codes.dtype == torch.int32:
        return _packed(cls, codes, weight_scale, weight_shape, weight_zero_point, weight_g_idx)
    if codes.dtype == torch.float8_e4m3fn:
        _check_absent(f"weight {codes.dtype}", weight_zero_point=weight_zero_point)
    scales, group = _scales_of(weight_scale, codes, block)
    checkpoints.check_trivial_order("weight_g_idx", _g_idx(weight_g_idx), codes.shape[0], codes.shape[2], group[1])
    format = "int8" if codes.dtype == torch.int8 else "fp8_e4m3"
    if scale_type(format, "weight_scale", scales.dtype) == "e8m0" and group == (1, 32):
        format = "mxfp8"
    zeros = None
    if weight_zero_point is not None:
        zeros = checkpoints.experts_of("weight_zero_point", weight_zero_point, 3, "[E, N, K / g]")
        check_dtype("weight_zero_point", zeros, torch.int8)
        check_shape("weight_zero_point", zeros, tuple(scales.shape), f"weight_scale {list(scales.shape)}")
        zeros = None if not zeros.is_meta and not zeros.any() else zeros.to(scales.dtype)
    return checkpoints.oriented(cls, codes, scales, format, group, zeros=zeros)


def _fp4(cls, codes, weight_scale, weight_global_scale):
    scales = checkpoints.experts_of("weight_scale", weight_scale, 3, "[E, N, K / 32] or [E, N, K / 16]")
    num_experts, n, row_bytes = codes.shape
    format = "nvfp4" if scales.dtype == torch.float8_e4m3fn else "mxfp4"
    scale_type(format, "weight_scale", scales.dtype)
    group = check_group(format, None)
    check_shape("weight_scale", scales, checkpoints.grid_of((num_experts, n, 2 * row_bytes), group), f"weight_packed {shape_of(codes)}")
    global_scales = None
    if format == "nvfp4":
        global_scales = checkpoints.one_for_each("weight_global_scale", weight_global_scale, num_experts).reciprocal()
    else:
        _check_absent("scales that are powers of two", weight_global_scale=weight_global_scale)
    return cls(codes.contiguous(), scales.contiguous(), global_scales=global_scales, format=format)


def _packed(cls, words, weight_scale, weight_shape, weight_zero_point, weight_g_idx):
    num_experts, n, columns = words.shape
    if weight_shape is None:
        raise TypeError("weight_shape must be given with an int32 weight_packed, got None")
    k = int(torch.as_tensor(weight_shape).flatten()[1])
    bits = next((bits for bits in (4, 8) if -(-k * bits // 32) == columns), None)
    if bits is None:
        raise ValueError(f"weight_packed must be int32 [E, N, ceil(K * bits / 32)] of 4 or 8 bits with weight_shape's K = {k}, "
                         f"got {shape_of(words)}")
    if bits == 4 and k % 2:
        raise ValueError(f"weight_shape must have an even K, as codes lie two in a byte, got {k}")
    scales = checkpoints.experts_of("weight_scale", weight_scale, 3, "[E, N, K / g]")
    groups = scales.shape[2]
    check_shape("weight_scale", scales, (num_experts, n, groups), f"weight_packed {shape_of(words)}")
    group = checkpoints.group_of("weight_scale", scales, k, groups)
    checkpoints.check_trivial_order("weight_g_idx", _g_idx(weight_g_idx), num_experts, k, group)
    zeros = None
    if weight_zero_point is not None:
        zeros = checkpoints.experts_of("weight_zero_point", weight_zero_point, 3, "[E, ceil(N * bits / 32), K / g] or [E, N, K / g]")
        check_dtype("weight_zero_point", zeros, torch.int32, torch.int8)
        rows = n if zeros.dtype == torch.int8 else -(-n * bits // 32)
        check_shape("weight_zero_point", zeros, (num_experts, rows, groups), f"weight_packed {shape_of(words)} and {bits} bits")
        if zeros.dtype == torch.int8:
            zeros = (zeros.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
        else:
            zeros = numbers_of_words(zeros.mT, bits).mT[:, :n]
    codes = bytes_of_words(words)[..., :k * bits // 8].contiguous()
    return checkpoints.unsigned(cls, codes, scales, zeros, bits, group, "weight_scale")


def _scales_of(weight_scale, codes: torch.Tensor, block) -> tuple[torch.Tensor, tuple[int, int]]:
    """[E, ceil(N / gn), ceil(K / gk)], and (gn, gk), of 8-bit codes."""
    num_experts, n, k = codes.shape
    layout = "[E], [E, 1], [E, N, K / g] or [E, ceil(N / bn), ceil(K / bk)]"
    check_tensor("weight_scale", weight_scale, None, layout)
    if weight_scale.numel() == num_experts and weight_scale.dim() < 3:
        weight_scale = weight_scale.reshape(num_experts, 1, 1)
    scales = checkpoints.experts_of("weight_scale", weight_scale, 3, layout)
    if scales.shape[1:] == (1, 1):
        group = n, k
    elif scales.shape[1] == n:
        group = 1, checkpoints.group_of("weight_scale", scales, k, scales.shape[2])
    else:
        group = check_group("fp8_e4m3", block, "block")
    check_shape("weight_scale", scales, checkpoints.grid_of(codes.shape, group), f"weight {shape_of(codes)} and block {block}")
    return scales, group


def _g_idx(g_idx):
    """None where no order is said: -1 everywhere."""
    return None if g_idx is None or g_idx.is_meta or (g_idx == -1).all() else g_idx


def _check_absent(beside: str, **tensors) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            raise ValueError(f"{name} must be None with {beside}, got {shape_of(tensor)}")
