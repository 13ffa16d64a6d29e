"""What the adapters of other libraries' functions share."""
from __future__ import annotations

from contextlib import contextmanager

import torch

from ..ops import checks
from ..ops.weights import Weight

__all__ = ["check_bias", "check_weight", "check_weight_shape", "described", "named"]


@contextmanager
def named(*names: str):
    """What converters say of their arguments is said of these."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{', '.join(names)}: {error}") from None


def check_bias(name: str, bias, expected: list[int]) -> None:
    if bias is not None:
        checks.check_tensor(name, bias, 2, "[E, N]")
        checks.check_dtype(name, bias.dtype)
        if list(bias.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {list(bias.shape)}")


def check_weight(name: str, w, layout: str) -> None:
    checks.check_weight_type(name, w)
    if isinstance(w, torch.Tensor):
        checks.check_tensor(name, w, 3, layout)


def check_weight_shape(name: str, w: Weight, expected: list[int], other_name: str, other: Weight, more: str = "") -> None:
    """ValueError unless it has this shape, which the other one asks for, and its dtype if both are dense."""
    dense = isinstance(w, torch.Tensor) and isinstance(other, torch.Tensor)
    if list(w.shape) != expected or dense and w.dtype != other.dtype:
        dtype = str(other.dtype).removeprefix("torch.") if dense else ""
        raise ValueError(f"{name} must be {dtype}{expected} for {other_name} {described(other)}{more}, got {described(w)}")


def described(value) -> str:
    return checks.shape_of(value) if isinstance(value, torch.Tensor) else str(value)
