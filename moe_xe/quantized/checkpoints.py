"""Quantised weights of published checkpoints, from their tensors: classmethods of `QuantizedWeight`.

Each takes the tensors of all experts, with a leading dimension E, or one expert's, without. What lies as kernels read it is not copied.
Some look at values (zeros, g_idx) and so wait for the device.
"""
from __future__ import annotations

import torch

from .checks import check_dtype, check_group, check_shape, check_tensor, is_contiguous_within_experts, scale_type, shape_of
from .words import awq_codes, awq_numbers, bytes_of_words, numbers_of_words

__all__ = ["FP8_FORMATS", "check_trivial_order", "experts_of", "from_awq", "from_fp8", "from_fp8_block", "from_gpt_oss", "from_gptq",
           "from_modelopt", "grid_of", "group_of", "one_for_each", "oriented", "unsigned"]

FP8_FORMATS = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def from_gpt_oss(cls, blocks: torch.Tensor, scales: torch.Tensor):
    """gpt-oss' `*_blocks`, uint8 [E, N, K / 32, 16], and `*_scales`, uint8 or float8_e8m0fnu [E, N, K / 32], as mxfp4; nothing is copied.

    `gate_up_proj`'s gates and ups alternate: `interleaved=True` of `fused_moe`.
    """
    blocks, scales = experts_of("blocks", blocks, 4, "[E, N, K / 32, 16]"), experts_of("scales", scales, 3, "[E, N, K / 32]")
    check_dtype("blocks", blocks, torch.uint8)
    scale_type("mxfp4", "scales", scales.dtype)
    check_shape("blocks", blocks, (*blocks.shape[:3], 16), "blocks of 32 codes")
    check_shape("scales", scales, tuple(blocks.shape[:3]), f"blocks {list(blocks.shape)}")
    return cls(blocks.contiguous().flatten(2), scales.contiguous(), format="mxfp4")


def from_fp8_block(cls, weight: torch.Tensor, weight_scale_inv: torch.Tensor, block: tuple[int, int] = (128, 128),
                   weight_layout: str = "enk"):
    """FP8 with a scale for each block (DeepSeek-V3, Qwen3's FP8): the scale multiplies, whatever its name says.

    weight: float8_e4m3fn or float8_e5m2 [E, N, K]. weight_scale_inv: [E, ceil(N / bn), ceil(K / bk)], float32, float16, bfloat16 or
    float8_e8m0fnu (or its bytes). block: (bn, bk). weight_layout: "ekn" if they are [E, K, N] and [E, ceil(K / bk), ceil(N / bn)]; the
    result is [E, N, K].
    """
    n, k = ("N", "K") if weight_layout == "enk" else ("K", "N")
    weight = _fp8_weight(weight, weight_layout)
    scales = experts_of("weight_scale_inv", weight_scale_inv, 3, f"[E, ceil({n} / b{n.lower()}), ceil({k} / b{k.lower()})]")
    scale_type(FP8_FORMATS[weight.dtype], "weight_scale_inv", scales.dtype)
    block = check_group(FP8_FORMATS[weight.dtype], block, "block")
    group = block if weight_layout == "enk" else block[::-1]
    check_shape("weight_scale_inv", scales, grid_of(weight.shape, group), f"weight {list(weight.shape)} and block {block}")
    return oriented(cls, weight, scales, FP8_FORMATS[weight.dtype], group, weight_layout)


def from_fp8(cls, weight: torch.Tensor, scale: torch.Tensor, weight_layout: str = "enk"):
    """FP8 with a scale for each expert, or for each output (channel), or for each of G equal runs of outputs, such as gates and ups.

    weight: float8_e4m3fn or float8_e5m2 [E, N, K]. scale: [E], [E, G], [E, G, 1] or [E, 1, G], whose G divides N; float32, float16 or
    bfloat16.
    weight_layout: "ekn" for [E, K, N] weights (Llama-4); the result is [E, N, K] all the same, and nothing is copied.
    """
    one_expert = isinstance(weight, torch.Tensor) and weight.dim() == 2
    weight = _fp8_weight(weight, weight_layout)
    num_experts, n = weight.shape[0], weight.shape[1 if weight_layout == "enk" else 2]
    check_tensor("scale", scale, None, "[E], [E, G], [E, G, 1] or [E, 1, G]")
    scale_type(FP8_FORMATS[weight.dtype], "scale", scale.dtype)
    scales = scale.detach().unsqueeze(0) if one_expert and (scale.dim() == 0 or scale.numel() != 1) else scale.detach()
    runs = max(scales.shape[1:], default=1)
    if scales.dim() not in (1, 2, 3) or not runs or scales.numel() != num_experts * runs or scales.shape[0] != num_experts or n % runs:
        raise ValueError(f"scale must be [E], [E, G], [E, G, 1] or [E, 1, G] with E = {num_experts} and a G that divides N = {n}, "
                         f"got {shape_of(scale)}")
    rows, k = n // runs, weight.shape[2 if weight_layout == "enk" else 1]
    grid, group = ((num_experts, runs, 1), (rows, k)) if weight_layout == "enk" else ((num_experts, 1, runs), (k, rows))
    return oriented(cls, weight, scales.reshape(grid), FP8_FORMATS[weight.dtype], group, weight_layout)


def from_gptq(cls, qweight: torch.Tensor, qzeros: torch.Tensor | None, scales: torch.Tensor, g_idx: torch.Tensor | None = None,
              bits: int = 4, version: int = 1):
    """GPTQ's and AutoRound's tensors as uint4 or int8, without zeros if all are the middle; codes are transposed, a copy.

    qweight: int32 [E, K * bits / 32, N]. qzeros: int32 [E, K / g, N * bits / 32], or None for the middle. scales: [E, K / g, N].
    bits: 4 or 8. version: of the file format; 1 ("gptq") keeps zeros less one, 2 ("gptq_v2") as they are.
    g_idx: [E, K], the group of each k, or None. Only k // g: act-order (desc_act) is a ValueError, as groups would not be runs of k.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    qweight, scales = experts_of("qweight", qweight, 3, "[E, K * bits / 32, N]"), experts_of("scales", scales, 3, "[E, K / g, N]")
    check_dtype("qweight", qweight, torch.int32)
    num_experts, words, n = qweight.shape
    k, groups = words * 32 // bits, scales.shape[1]
    check_shape("scales", scales, (num_experts, groups, n), f"qweight {list(qweight.shape)}")
    group = group_of("scales", scales, k, groups)
    check_trivial_order("g_idx", g_idx, num_experts, k, group)
    zeros = None
    if qzeros is not None:
        qzeros = experts_of("qzeros", qzeros, 3, "[E, K / g, N * bits / 32]")
        check_dtype("qzeros", qzeros, torch.int32)
        check_shape("qzeros", qzeros, (num_experts, groups, -(-n * bits // 32)), f"scales {list(scales.shape)} and {bits} bits")
        zeros = numbers_of_words(qzeros, bits)[..., :n] + (1 if version == 1 else 0) & 2**bits - 1
    return unsigned(cls, bytes_of_words(qweight.mT), scales.mT, None if zeros is None else zeros.mT, bits, group)


def from_awq(cls, qweight: torch.Tensor, qzeros: torch.Tensor | None, scales: torch.Tensor):
    """AWQ's tensors as uint4, without zeros if all are 8; codes are transposed, a copy.

    qweight: int32 [E, K, N / 8]. qzeros: int32 [E, K / g, N / 8], or None for 8. scales: [E, K / g, N].
    """
    qweight, scales = experts_of("qweight", qweight, 3, "[E, K, N / 8]"), experts_of("scales", scales, 3, "[E, K / g, N]")
    check_dtype("qweight", qweight, torch.int32)
    num_experts, k, words = qweight.shape
    if k % 2:
        raise ValueError(f"qweight must have an even K, as codes lie two in a byte, got {shape_of(qweight)}")
    check_shape("scales", scales, (num_experts, scales.shape[1], 8 * words), f"qweight {list(qweight.shape)}")
    group = group_of("scales", scales, k, scales.shape[1])
    zeros = None
    if qzeros is not None:
        qzeros = experts_of("qzeros", qzeros, 3, "[E, K / g, N / 8]")
        check_dtype("qzeros", qzeros, torch.int32)
        check_shape("qzeros", qzeros, (num_experts, scales.shape[1], words), f"scales {list(scales.shape)}")
        zeros = awq_numbers(qzeros).mT
    return unsigned(cls, awq_codes(qweight), scales.mT, zeros, 4, group)


def from_modelopt(cls, weight: torch.Tensor, weight_scale: torch.Tensor, weight_scale_2: torch.Tensor):
    """ModelOpt's NVFP4: uint8 [E, N, K / 2], float8_e4m3fn [E, N, K / 16] and, which multiplies, float32 [E]; nothing is copied."""
    weight, scales = experts_of("weight", weight, 3, "[E, N, K / 2]"), experts_of("weight_scale", weight_scale, 3, "[E, N, K / 16]")
    check_dtype("weight", weight, torch.uint8)
    scale_type("nvfp4", "weight_scale", scales.dtype)
    check_shape("weight_scale", scales, (*weight.shape[:2], -(-weight.shape[2] // 8)), f"weight {list(weight.shape)}")
    global_scales = one_for_each("weight_scale_2", weight_scale_2, weight.shape[0])
    return cls(weight.contiguous(), scales.contiguous(), global_scales=global_scales, format="nvfp4")


def experts_of(name: str, tensor, dims: int, layout: str) -> torch.Tensor:
    """The tensor with a leading dimension of experts, without a gradient."""
    if isinstance(tensor, torch.Tensor) and tensor.dim() == dims - 1:
        tensor = tensor.unsqueeze(0)
    check_tensor(name, tensor, dims, layout)
    return tensor.detach()


def one_for_each(name: str, tensor, num_experts: int) -> torch.Tensor:
    """[E] float32 of a tensor with so many elements."""
    check_tensor(name, tensor, None, "[E]")
    check_dtype(name, tensor, torch.float32)
    if tensor.numel() != num_experts:
        raise ValueError(f"{name} must be [{num_experts}], one for each expert, got {shape_of(tensor)}")
    return tensor.detach().reshape(num_experts).contiguous()


def group_of(name: str, scales: torch.Tensor, k: int, groups: int) -> int:
    """The columns of a group, of so many groups of K columns."""
    if groups == 0 or k % groups:
        raise ValueError(f"{name} must have a number of groups that divides K = {k}, got {shape_of(scales)}")
    return k // groups


def check_trivial_order(name: str, g_idx: torch.Tensor | None, num_experts: int, k: int, group: int) -> None:
    if g_idx is None or g_idx.numel() == 0 or g_idx.is_meta:
        return
    g_idx = experts_of(name, g_idx, 2, "[E, K]")
    check_shape(name, g_idx, (num_experts, k), f"K = {k}")
    if not (g_idx == torch.arange(k, device=g_idx.device) // group).all():
        raise ValueError(f"{name} must be k // {group}, got another order: act-order (desc_act=True) is not supported")


def unsigned(cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int,
             scales_name: str = "scales"):
    """Of unsigned codes [E, N, K * bits / 8] and what number of them is zero, [E, N, K / group]: None for the middle."""
    if zeros is not None and not zeros.is_meta and bool((zeros == 2 ** (bits - 1)).all()):
        zeros = None
    if bits == 8:       # int8 has the same bits but the highest
        codes = (codes ^ 128).view(torch.int8)
        zeros = None if zeros is None else zeros.to(torch.int16) - 128
    scale_type(format := "uint4" if bits == 4 else "int8", scales_name, scales.dtype)
    return cls(codes, scales.contiguous(), None if zeros is None else zeros.to(scales.dtype).contiguous(), format=format, group=(1, group))


def oriented(cls, codes: torch.Tensor, scales: torch.Tensor, format: str, group: tuple[int, int], weight_layout: str = "enk",
             zeros: torch.Tensor | None = None):
    """Of 8-bit codes as they lie in memory, in either order."""
    transposed = weight_layout == "ekn"
    if not is_contiguous_within_experts(codes) and is_contiguous_within_experts(codes.mT):
        codes, scales, zeros, group, transposed = codes.mT, scales.mT, zeros if zeros is None else zeros.mT, group[::-1], not transposed
    if not is_contiguous_within_experts(codes):
        codes = codes.contiguous()
    return cls(codes, scales.contiguous(), None if zeros is None else zeros.contiguous(), format=format, group=group, transposed=transposed)


def _fp8_weight(weight, weight_layout: str) -> torch.Tensor:
    if weight_layout not in ("enk", "ekn"):
        raise ValueError(f'weight_layout must be "enk" ([E, N, K]) or "ekn" ([E, K, N]), got {weight_layout!r}')
    weight = experts_of("weight", weight, 3, "[E, N, K]" if weight_layout == "enk" else "[E, K, N]")
    check_dtype("weight", weight, *FP8_FORMATS)
    return weight


def grid_of(shape: tuple[int, int, int], group: tuple[int, int]) -> tuple[int, int, int]:
    num_experts, n, k = shape
    return num_experts, -(-n // group[0]), -(-k // group[1])
