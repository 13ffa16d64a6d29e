"""A process group whose rows take as long as on a link of a given speed, for measurements of overlap on one machine."""
from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist

__all__ = ["slow_group"]


def slow_group(bandwidth: float | None = None, latency: float = 0.0) -> dist.ProcessGroup:
    """All ranks of the default group, over gloo, on CPU tensors; all call it together.

    bandwidth: bytes a second that a rank's link sends, one message after the other; None: any number. latency: seconds from the end of a
    message to its arrival. Only `all_to_all` takes this long; who waits for it sleeps, and the processor is free.
    """
    def create(store, rank, size, timeout):
        return _SlowGroup(dist.ProcessGroupGloo(store, rank, size, timeout), bandwidth, latency)

    name = f"slow_gloo_{_SlowGroup.created}"
    _SlowGroup.created += 1
    dist.Backend.register_backend(name, create, devices=["cpu"])
    return dist.new_group(backend=name, timeout=timedelta(seconds=300))


class _SlowGroup(dist.ProcessGroup):
    created = 0

    def __init__(self, group: dist.ProcessGroupGloo, bandwidth: float | None, latency: float):
        super().__init__(group.rank(), group.size())
        self._group, self._bandwidth, self._latency, self._free_at = group, bandwidth, latency, 0.0

    def alltoall_base(self, received, sent, rows_received, rows_sent, *options):
        """On the link behind what it has still to send; what stays on this rank takes no time."""
        num_bytes = max(self._leaving(received, rows_received), self._leaving(sent, rows_sent))
        seconds = 0.0 if self._bandwidth is None else num_bytes / self._bandwidth
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        return _Work(self._group.alltoall_base(received, sent, rows_received, rows_sent, *options), self._free_at + self._latency)

    def _leaving(self, rows: torch.Tensor, rows_of_ranks: list[int]) -> float:
        """Bytes of rows to or from other ranks."""
        own = rows_of_ranks[self.rank()] / max(rows.shape[0], 1) if rows_of_ranks else 1 / self.size()
        return rows.nbytes * (1 - own)

    def allgather_into_tensor_coalesced(self, gathered, sent, *_):
        *_, last = (self._group._allgather_base(*tensors) for tensors in zip(gathered, sent))
        return last

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "slow_gloo"


class _Work(dist._Work):
    def __init__(self, work, arrives_at: float):
        super().__init__()
        self._work, self._arrives_at = work, arrives_at

    def wait(self, *timeout) -> bool:
        done = self._work.wait(*timeout)
        time.sleep(max(self._arrives_at - time.monotonic(), 0.0))
        return done
