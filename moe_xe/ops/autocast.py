"""torch.autocast for ops of ours, of which torch has no list."""
from __future__ import annotations

import functools

import torch

from .checks import DTYPES

__all__ = ["autocast", "without_autocast"]


def autocast(*tensors):
    """The same values, each bfloat16, float16 or float32 tensor in torch's autocast dtype where autocast is on for its device.

    float64 stays, as with torch's own ops; so do float8, whose values mean nothing without scales, and all that is not a tensor.
    """
    return tuple(_cast(tensor) for tensor in tensors)


def _cast(tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
        return tensor
    kind = tensor.device.type
    if kind not in ("cpu", "xpu"):      # is told later, by name
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def without_autocast(op):
    """The body of an op: it computes with what its caller has cast, also where its backward pass runs in an autocast region."""
    @functools.wraps(op)
    def body(submission, *arguments):
        with torch.autocast(submission.device.type, enabled=False):
            return op(submission, *arguments)

    return body
