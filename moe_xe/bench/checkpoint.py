"""Dense weights as a published checkpoint would have them."""
from __future__ import annotations

import torch

from ..plan.formats import Checkpoint
from ..quantized.encoding import SCALE_DTYPES
from ..quantized.weight import QuantizedWeight

__all__ = ["as_in_checkpoint"]


def as_in_checkpoint(w: torch.Tensor, checkpoint: Checkpoint) -> QuantizedWeight:
    """w: [E, N, K]."""
    rows, columns = checkpoint.group
    return QuantizedWeight.quantize(w, checkpoint.format, (rows, min(columns, w.shape[2])), scale_dtype=SCALE_DTYPES[checkpoint.scales][0])
