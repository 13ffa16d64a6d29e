"""Codes and scales as tensors: their dtypes, the numbers they are, and the nearest codes of numbers."""
from __future__ import annotations

import torch

from ..plan.formats import Codes, ScaleType

__all__ = ["CODE_DTYPES", "SCALE_DTYPES", "code_range", "decode", "decode_scales", "encode", "each"]

# The first one says what the bytes are.
CODE_DTYPES = {
    Codes.int4: (torch.uint8,),
    Codes.uint4: (torch.uint8,),
    Codes.e2m1: (torch.uint8,),
    Codes.int8: (torch.int8,),
    Codes.e4m3: (torch.float8_e4m3fn, torch.uint8),
    Codes.e5m2: (torch.float8_e5m2, torch.uint8),
}
SCALE_DTYPES = {
    ScaleType.f32: (torch.float32,),
    ScaleType.f16: (torch.float16,),
    ScaleType.bf16: (torch.bfloat16,),
    ScaleType.e8m0: (torch.float8_e8m0fnu, torch.uint8),
    ScaleType.e4m3: (torch.float8_e4m3fn, torch.uint8),
}


def code_range(codes: Codes) -> tuple[float, float]:
    """The smallest and the largest number of a code."""
    if codes.bits == 4:
        return min(codes.table), max(codes.table)
    dtype = CODE_DTYPES[codes][0]
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return float(limits.min), float(limits.max)


def decode(codes: Codes, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers of codes [.., bytes], as [.., K] in a float dtype that holds them."""
    if codes.bits == 8:
        return tensor.view(CODE_DTYPES[codes][0]).to(dtype)
    table = torch.tensor(codes.table, dtype=dtype, device=tensor.device)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=1)     # of each byte
    return pairs[tensor.int()].flatten(-2)


def decode_scales(scales: ScaleType, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that scales are, in float32 or float64."""
    return tensor.view(SCALE_DTYPES[scales][0]).to(dtype)


def encode(codes: Codes, numbers: torch.Tensor) -> torch.Tensor:
    """The nearest codes of float32 numbers [.., K], ties to even; past the largest and the smallest, these. 4 bits: pairs, [.., K / 2]."""
    numbers = numbers.clamp(*code_range(codes))
    if codes.bits == 8:
        dtype = CODE_DTYPES[codes][0]
        return (numbers if dtype.is_floating_point else numbers.round()).to(dtype)
    nibbles = _encode_e2m1(numbers) if codes is Codes.e2m1 else numbers.round().to(torch.int8).view(torch.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def _encode_e2m1(numbers: torch.Tensor) -> torch.Tensor:
    """Steps are 0.5 up to 2, 1 up to 4 and 2 from there, and begin at codes 0, 4 and 6."""
    sizes = numbers.abs()
    codes = torch.where(sizes < 2, (2 * sizes).round(), torch.where(sizes < 4, sizes.round() + 2, (sizes / 2).round() + 4))
    return codes.to(torch.uint8) | numbers.signbit().to(torch.uint8) << 3


def each(grid: torch.Tensor, group: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    """For each element of a weight [N, K] its group's value of a grid [ceil(N / gn), ceil(K / gk)]."""
    rows, columns = (torch.arange(size, device=grid.device) // length for size, length in zip(shape, group))
    return grid[rows[:, None], columns]
