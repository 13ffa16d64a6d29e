"""Codes and scales of a dense weight."""
from __future__ import annotations

import math

import torch

from ..plan.formats import FORMATS, Codes, ScaleType, WeightFormat
from .encoding import CODE_DTYPES, SCALE_DTYPES, code_range, decode_scales, each, encode

__all__ = ["quantize", "usual_group"]


def usual_group(scheme: WeightFormat) -> tuple[int, int]:
    """The group of a format, or the one that most checkpoints of it have."""
    if scheme.group is not None:
        return scheme.group
    return (128, 128) if scheme.codes in (Codes.e4m3, Codes.e5m2) else (1, 128)


@torch.no_grad()
def quantize(w: torch.Tensor, format: str, group: tuple[int, int], scales_type: ScaleType, scale_dtype: torch.dtype,
             symmetric: bool) -> dict[str, torch.Tensor | None]:
    """The tensors of a QuantizedWeight, by field. One expert after the other: little memory is needed besides."""
    scheme = FORMATS[format]
    num_experts, n, k = w.shape
    grid = (num_experts, -(-n // group[0]), -(-k // group[1]))
    codes = w.new_empty((num_experts, n, k * scheme.codes.bits // 8), dtype=CODE_DTYPES[scheme.codes][0])
    scales = w.new_empty(grid, dtype=scale_dtype)
    zeros = None if symmetric else w.new_empty(grid, dtype=scale_dtype)
    global_scales = w.new_ones(num_experts, dtype=torch.float32) if scales_type is ScaleType.e4m3 else None
    for e in range(num_experts):
        expert = w[e].float()
        low, high = _extremes(expert, group)
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError(f"w must be finite, got infinity or NaN in expert {e}")
        if symmetric:
            zero, span, steps = scheme.zero, torch.maximum(-low, high), code_range(scheme.codes)[1] - scheme.zero
        else:
            first, last = code_range(scheme.codes)
            span, steps = high - low, last - first
        factor = 1.0
        if global_scales is not None and span.numel():
            factor = (span.max() / (steps * code_range(Codes.e4m3)[1])).clamp(min=torch.finfo(torch.float32).tiny)
            global_scales[e] = factor
        scales[e] = _scales(span / factor, steps, scales_type, scale_dtype)
        scale = decode_scales(scales_type, scales[e], torch.float32)
        if not symmetric:
            zeros[e] = (first - low / scale).round().clamp(first, last)
            zero = each(zeros[e].float(), group, (n, k))
        codes[e] = encode(scheme.codes, expert / each(scale * factor, group, (n, k)) + zero)
    return {"codes": codes, "scales": scales, "zeros": zeros, "global_scales": global_scales}


def _extremes(expert: torch.Tensor, group: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest of each group of [N, K] and 0."""
    (n, k), (rows, columns) = expert.shape, (max(1, min(pair)) for pair in zip(group, expert.shape))
    padded = torch.nn.functional.pad(expert, (0, -k % columns, 0, -n % rows))
    groups = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return groups.amin((1, 3)).clamp(max=0), groups.amax((1, 3)).clamp(min=0)


def _scales(span: torch.Tensor, steps: float, scales_type: ScaleType, dtype: torch.dtype) -> torch.Tensor:
    """Of groups whose `steps` are to reach `span`."""
    if scales_type is ScaleType.e8m0:       # OCP: 2^(floor(log2(span)) - that of the largest number); span's own bits have the first
        exponents = (span.view(torch.int32) >> 23) - int(math.log2(steps))
        return exponents.clamp(0, 254).to(torch.uint8).view(dtype)
    limits = torch.finfo(SCALE_DTYPES[scales_type][0])
    # None is so small that its rounding changes much: no number is cut by more than half a step.
    exact = (span / steps).clamp(min=steps * limits.tiny * limits.eps)
    scales = exact.to(SCALE_DTYPES[scales_type][0])
    if not scales.float().isfinite().all():
        raise ValueError(f"scale_dtype must hold the scales of w, up to {exact.max():.3g}, got {dtype}")
    return scales.view(dtype)
