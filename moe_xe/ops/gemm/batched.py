"""The batched layout: [E, max_rows, ...] has room for max_rows rows of each expert, of which it has the first tokens_per_expert[e].

Below the public functions it is [E * max_rows, ...], with rows_format "batched".
"""
from __future__ import annotations

import torch

from .. import checks

__all__ = ["flat_rows", "is_batched"]


def is_batched(rows) -> bool:
    return isinstance(rows, torch.Tensor) and rows.dim() == 3


def flat_rows(name: str, rows: torch.Tensor, num_experts: int, max_rows: int, layout: str) -> torch.Tensor:
    """[E, max_rows, ...] as [E * max_rows, ...] in the same memory; `layout` names the dimensions. Raises TypeError or ValueError."""
    checks.check_tensor(name, rows, layout.count(",") + 1, layout)
    if not checks.has_shape(rows, (num_experts, max_rows)):
        raise ValueError(f"{name} must be {layout} with E = {num_experts} and max_rows = {max_rows}, got {checks.shape_of(rows)}")
    apart = rows.stride(1) * max_rows
    if not (checks.surely(num_experts <= 1) or checks.surely(rows.numel() == 0) or checks.holds(rows.stride(0) == apart)):
        raise ValueError(f"{name} must have its experts max_rows rows apart (stride(0) == {apart}), got strides {tuple(rows.stride())}; "
                         f"call .contiguous() on it")
    return rows.view(num_experts * max_rows, *rows.shape[2:])
