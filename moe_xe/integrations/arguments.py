"""What the adapters of other libraries' functions share."""
from __future__ import annotations

from contextlib import contextmanager

from ..ops import checks

__all__ = ["check_bias", "named"]


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
