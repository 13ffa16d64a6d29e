"""How far a result is from its reference."""
from __future__ import annotations

from dataclasses import dataclass

import torch

# the largest relative error of rounding one value to the type: half a unit in the last place
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@dataclass(frozen=True)
class Difference:
    """max_error: largest error over the reference's RMS. calc_diff: <x - y, x - y> / (<x, x> + <y, y>), DeepGEMM's measure,
    which is 0 for equal tensors and 1 where one is zero and the other is not."""
    max_error: float
    calc_diff: float


def difference(result: torch.Tensor, reference: torch.Tensor) -> Difference:
    """Compares in float64; a NaN or an infinity anywhere, also in both, gives NaN or infinity, which no limit accepts.
    Raises ValueError for different shapes."""
    if result.shape != reference.shape:
        raise ValueError(f"result must have reference's shape {list(reference.shape)}, got {list(result.shape)}")
    if not reference.numel():
        return Difference(0.0, 0.0)
    x, y = result.double(), reference.double()
    error, tiny = x - y, torch.finfo(torch.float64).tiny
    rms = y.square().mean().sqrt().clamp_min(tiny)
    energy = (x.square().sum() + y.square().sum()).clamp_min(tiny)
    return Difference(float(error.abs().max() / rms), float(error.square().sum() / energy))


def tolerance(dtype: torch.dtype, k: int, tf32: bool = False) -> Difference:
    """Limits for a GEMM with float32 accumulation over K terms and one last rounding to `dtype`.

    A value of up to eight RMS is rounded once; the sum's own error grows with sqrt(K) float32 roundings (tf32 keeps ten
    bits of each factor). calc_diff is half the mean square of the relative error.
    """
    accumulation = 2.0**-10 if tf32 else 2.0**-24 * k**0.5 * 4
    return Difference(8 * _ROUNDING[dtype] + accumulation, (_ROUNDING[dtype]**2 + accumulation**2) / 2)


def agrees(result: torch.Tensor, reference: torch.Tensor, k: int, tf32: bool = False) -> bool:
    """True where both measures are within `tolerance`."""
    found, limit = difference(result, reference), tolerance(result.dtype, k, tf32)
    return found.max_error <= limit.max_error and found.calc_diff <= limit.calc_diff


def reference_grouped_gemm(a: torch.Tensor, w: torch.Tensor, tokens_per_expert: list[int],
                           bias: torch.Tensor | None = None) -> torch.Tensor:
    """[sum of rows, N] in float32 (float64 for float32 inputs), one matmul an expert; w is [E, N, K]."""
    dtype = torch.float64 if a.dtype == torch.float32 else torch.float32
    parts, begin = [], 0
    for expert, rows in enumerate(tokens_per_expert):
        part = a[begin:begin + rows].to(dtype) @ w[expert].to(dtype).T
        parts.append(part if bias is None else part + bias[expert].to(dtype))
        begin += rows
    return torch.cat(parts) if parts else a.new_empty(0, w.shape[1], dtype=dtype)
