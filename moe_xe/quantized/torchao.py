"""torchao's quantised tensors, by their classes' names and attributes: torchao itself is not needed."""
from __future__ import annotations

import torch

from . import checkpoints
from .checks import check_group, check_shape
from .words import bytes_of_words

__all__ = ["from_torchao"]


def from_torchao(cls, tensor):
    """A torchao tensor [E, N, K], or [N, K] of one expert. Codes are not copied.

    Int8Tensor -> int8; Float8Tensor -> fp8_e4m3 or fp8_e5m2, PerTensor, PerRow or PerBlock; Int4PlainInt32Tensor -> uint4; Int4Tensor ->
    int4, whose zero point is what 0 stands for: zeros are -zero_point / scale, in float32; MXTensor -> mxfp4 or mxfp8 and NVFP4Tensor ->
    nvfp4, not swizzled. Activations are never quantised, whatever its act_quant_kwargs say. Any other class is a TypeError; act_pre_scale
    is a ValueError.
    """
    kind = type(tensor).__name__
    if kind not in _READERS:
        raise TypeError(f"tensor must be one of torchao's {', '.join(_READERS)}, got {kind}")
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise ValueError("tensor.act_pre_scale must be None, got a tensor: activations are taken as they are")
    if getattr(tensor, "is_swizzled_scales", getattr(tensor, "_is_swizzled_scales", False)):
        raise ValueError("tensor.is_swizzled_scales must be False, got True: scales are read in the order of the codes")
    return _READERS[kind](cls, tensor)


def _plain8(cls, tensor):
    """int8 or FP8 codes, with a scale for each block."""
    codes = checkpoints.experts_of("tensor.qdata", tensor.qdata, 3, "[E, N, K]")
    num_experts, n, k = codes.shape
    format = "int8" if codes.dtype == torch.int8 else checkpoints.FP8_FORMATS.get(codes.dtype)
    if format is None:
        raise TypeError(f"tensor.qdata must be int8, float8_e4m3fn or float8_e5m2, got {codes.dtype}")
    *experts, rows, columns = tensor.block_size
    group = check_group(format, (min(rows, n), min(columns, k)), "tensor.block_size")
    _, grid_rows, grid_columns = checkpoints.grid_of(codes.shape, group)
    scale, whole = tensor.scale.detach(), bool(experts) and experts[0] >= num_experts > 1      # one for all experts
    if scale.numel() != (1 if whole else num_experts) * grid_rows * grid_columns:
        raise ValueError(f"tensor.scale must have one element for each block {list(tensor.block_size)}, got {list(scale.shape)}")
    scales = scale.reshape(-1, grid_rows, grid_columns).expand(num_experts, -1, -1)
    zeros = getattr(tensor, "zero_point", None)
    if zeros is not None:
        zeros = zeros.reshape(-1, grid_rows, grid_columns).expand(num_experts, -1, -1).to(scales.dtype)
    return checkpoints.oriented(cls, codes, scales, format, group, zeros=zeros)


def _int4_plain_int32(cls, tensor):
    words, scales, zeros = _groups(tensor, "[E, N, K / 8]")
    return checkpoints.unsigned(cls, bytes_of_words(words), scales, zeros, 4, tensor.block_size[-1], "tensor.scale")


def _int4(cls, tensor):
    codes, scales, zero_points = _groups(tensor, "[E, N, K / 2]")
    scales = scales.float()
    zeros = torch.where(scales == 0, 0, -zero_points / scales)
    group = 1, tensor.block_size[-1]
    return cls(codes.view(torch.uint8).contiguous(), scales.contiguous(), zeros.contiguous(), format="int4", group=group)


def _groups(tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, and scales and zero points as [E, N, K / g]: they are kept as [E, K / g, N]."""
    codes = checkpoints.experts_of("tensor.qdata", tensor.qdata, 3, layout)
    scales = checkpoints.experts_of("tensor.scale", tensor.scale, 3, "[E, K / g, N]")
    zeros = checkpoints.experts_of("tensor.zero_point", tensor.zero_point, 3, "[E, K / g, N]")
    check_shape("tensor.zero_point", zeros, tuple(scales.shape), f"tensor.scale {list(scales.shape)}")
    return codes, scales.mT, zeros.mT


def _mx(cls, tensor):
    codes = checkpoints.experts_of("tensor.qdata", tensor.qdata, 3, "[E, N, ..]")
    scales = checkpoints.experts_of("tensor.scale", tensor.scale, 3, "[E, N, K / 32]")
    if codes.dtype in (torch.uint8, torch.float4_e2m1fn_x2):
        return cls(codes.view(torch.uint8).contiguous(), scales.contiguous(), format="mxfp4", group=(1, tensor.block_size))
    format = "mxfp8" if codes.dtype == torch.float8_e4m3fn and tensor.block_size == 32 else checkpoints.FP8_FORMATS.get(codes.dtype)
    if format is None:
        raise TypeError(f"tensor.qdata must be of 4 or 8 bits, got {codes.dtype}")
    return checkpoints.oriented(cls, codes, scales, format, (1, tensor.block_size))


def _nvfp4(cls, tensor):
    codes = checkpoints.experts_of("tensor.qdata", tensor.qdata, 3, "[E, N, K / 2]").view(torch.uint8)
    scale = tensor.per_tensor_scale
    if scale is None:
        scale = torch.ones(1, device=codes.device)
    return cls.from_modelopt(codes, tensor.scale, scale.detach().reshape(-1).expand(codes.shape[0]))


_READERS = {"Int8Tensor": _plain8, "Float8Tensor": _plain8, "Int4PlainInt32Tensor": _int4_plain_int32, "Int4Tensor": _int4, "MXTensor": _mx,
            "NVFP4Tensor": _nvfp4}
