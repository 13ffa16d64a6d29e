"""How many bytes ranks send to each other."""
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_EXCHANGE = torch.ops._c10d_functional.all_to_all_single.default


class SentBytes(TorchDispatchMode):
    """number: of bytes that this rank sends to others in all-to-all exchanges while the mode is on."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.number = rank, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _EXCHANGE:
            message, _, rows, _ = args
            self.number += (sum(rows) - rows[self.rank]) * message.nbytes // max(message.shape[0], 1)
        return func(*args, **(kwargs or {}))
