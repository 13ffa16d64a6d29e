"""What ranks send to each other, counted and, if wanted, slowed down as a narrow link would."""
from __future__ import annotations

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_EXCHANGE, _WAIT = torch.ops._c10d_functional.all_to_all_single.default, torch.ops._c10d_functional.wait_tensor.default


class Transport(TorchDispatchMode):
    """Of a rank's all-to-all exchanges. sent_bytes: to other ranks. seconds_per_byte: a link takes so long for each, both ways at a time and
    one exchange after another, beside what else this rank does: who waits for an exchange sleeps until it is through.
    """

    def __init__(self, rank: int, seconds_per_byte: float = 0.0):
        super().__init__()
        self.rank, self.seconds_per_byte, self.sent_bytes = rank, seconds_per_byte, 0
        self._free = 0.0                        # when the link is
        self._due: dict[int, float] = {}        # by the address of what comes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is _EXCHANGE:
            message, received, sent, _ = args
            row_bytes = message.nbytes // max(message.shape[0], 1) or out.nbytes // max(out.shape[0], 1)
            there, here = (row_bytes * (sum(rows) - rows[self.rank]) for rows in (sent, received))
            self.sent_bytes += there
            self._free = max(self._free, time.perf_counter()) + max(there, here) * self.seconds_per_byte
            self._due[out.data_ptr()] = self._free
        elif func is _WAIT and self.seconds_per_byte:
            time.sleep(max(self._due.pop(args[0].data_ptr(), 0.0) - time.perf_counter(), 0.0))
        return out
