"""Which op computes experts: on one rank, or spread over several."""
from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from ..ops.weights import Weight
from ..quantized.weight import QuantizedWeight

__all__ = ["block_op"]


def block_op(op: Callable, module: nn.Module, w13: Weight) -> Callable:
    """`op`, fused_moe or lora_moe, or the same over the mesh of w13, if that is a DTensor."""
    tensor = w13.codes if isinstance(w13, QuantizedWeight) else w13
    if not hasattr(tensor, "device_mesh"):
        return op
    from ..distributed import expert_parallel_moe
    return functools.partial(expert_parallel_moe, group=None, **module.exchange)
