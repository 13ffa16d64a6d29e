"""One quantised weight of several: experts one after another, or their rows."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..plan.formats import FLOATS, FORMATS
from .checks import scale_type
from .encoding import SCALE_DTYPES, decode_scales

__all__ = ["cat"]


def cat(cls, weights: Sequence, dim: int = 0):
    """Weights of one format, group and dtype of scales, as one: a copy.

    dim 0: experts, such as single ones of a checkpoint. dim 1 (2 of transposed weights): outputs, such as gates and ups; where groups of
    rows do not meet, they are divided, down to the greatest common divisor. Zeros of one are enough. Different global scales of an expert's
    parts become part of float scales, in float32; of others where that is exact, else it is a ValueError.
    Raises TypeError or ValueError naming the argument.
    """
    weights = list(weights)
    if not weights:
        raise ValueError("weights must not be empty, got []")
    for i, weight in enumerate(weights):
        if not isinstance(weight, cls):
            raise TypeError(f"weights must be QuantizedWeights, got {type(weight).__name__} at {i}")
    first = weights[0]
    rows_dim = 2 if first.transposed else 1
    if dim not in (0, rows_dim):
        raise ValueError(f"dim must be 0 (experts) or {rows_dim} (outputs), got {dim!r}")
    axis = min(dim, 1)
    for i, weight in enumerate(weights):
        if (here := _kind(weight, axis)) != (there := _kind(first, axis)):
            raise ValueError(f"weights must be alike but along dim = {dim}, got {there} and, at {i}, {here}")
    if len(weights) == 1:
        return first
    global_scales = None
    if any(weight.global_scales is not None for weight in weights):
        weights = [weight if weight.global_scales is not None else
                   replace(weight, global_scales=torch.ones(weight.num_experts, device=weight.device)) for weight in weights]
        if axis:
            weights = _with_one_global_scale(weights)
            global_scales = weights[0].global_scales
        else:
            global_scales = torch.cat([weight.global_scales for weight in weights])
    group = _common_group(weights) if axis else first.group
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zero = FORMATS[first.format].zero
        zeros = torch.cat([_divided(weight, torch.full_like(weight.scales, zero) if weight.zeros is None else weight.zeros, group)
                           for weight in weights], axis)
    codes = torch.cat([weight.codes for weight in weights], axis)
    scales = torch.cat([_divided(weight, weight.scales, group) for weight in weights], axis)
    return cls(codes, scales, zeros, global_scales, first.format, group, first.transposed,
               finite=all(weight.finite for weight in weights))


def _kind(weight, axis: int) -> dict:
    """What weights must share to be joined along an axis of codes."""
    sizes = list(weight.codes.shape)
    del sizes[axis]
    return {"format": weight.format, "codes": weight.codes.dtype, "sizes": sizes, "group": weight.group if axis == 0 else weight.group[1],
            "scales": weight.scales.dtype, "transposed": weight.transposed, "device": weight.device}


def _common_group(weights) -> tuple[int, int]:
    """Groups of rows that begin where each part and each part's groups begin; a part of one group has no other beginning."""
    rows, columns = zip(*(weight.group for weight in weights))
    if FORMATS[weights[0].format].group is not None:
        return weights[0].group
    heights = [weight.codes.shape[1] for weight in weights]
    return max(1, math.gcd(*heights[:-1], *(gn for gn, height in zip(rows, heights) if gn < height))), columns[0]


def _divided(weight, grid: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """The scales or zeros of a weight for groups of fewer rows."""
    n, rows = weight.codes.shape[1], group[0]
    return grid if rows == weight.group[0] else grid[:, torch.arange(0, n, rows, device=grid.device) // weight.group[0]]


def _with_one_global_scale(weights) -> list:
    """The same numbers with the same global scales, or none."""
    common = torch.stack([weight.global_scales for weight in weights]).amax(0)
    if common.is_meta or all(torch.equal(weight.global_scales, common) for weight in weights):
        return weights
    kind = scale_type(weights[0].format, "scales", weights[0].scales.dtype)
    scaled = [decode_scales(kind, weight.scales, torch.float64) * weight.global_scales[:, None, None].double() for weight in weights]
    if kind in FLOATS:
        return [replace(weight, scales=scales.float(), zeros=None if weight.zeros is None else weight.zeros.float(), global_scales=None)
                for weight, scales in zip(weights, scaled)]
    result = []
    for weight, scales in zip(weights, scaled):
        nearest = (scales / common[:, None, None]).float().to(SCALE_DTYPES[kind][0])
        if not torch.equal(decode_scales(kind, nearest, torch.float64) * common[:, None, None], scales):
            raise ValueError(f"weights must have the same global scales, or such that their ratio times scales is exact in "
                             f"{SCALE_DTYPES[kind][0]}, got {[weight.global_scales.tolist() for weight in weights]}")
        result.append(replace(weight, scales=nearest.view(weight.scales.dtype), global_scales=common))
    return result
