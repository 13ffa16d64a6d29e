"""Which SYCL queue a call runs on: torch's XPU stream, the SYCL CPU device, or a queue that the user names."""
from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import torch

from .once import Once, once
from .runtime import DeviceFacts, Queue, devices

__all__ = ["DeviceFacts", "devices", "on_queue", "queue_for"]

_chosen: ContextVar[Queue | None] = ContextVar("moe_xe_queue", default=None)


@once
def _cpu_queue() -> Queue:
    return Queue.create("cpu")


def queue_for(device: torch.device) -> Queue:
    """The queue for tensors on `device`: the one chosen with `on_queue`, torch's current XPU stream, or the CPU device.

    Raises TypeError for another kind of device, moe_xe.runtime.DeviceNotFoundError where no SYCL device serves it.
    """
    chosen = _chosen.get()
    if chosen is not None:
        if not _reaches(facts_of(chosen), device):
            raise ValueError(f"the queue chosen with on_queue is on a {facts_of(chosen).kind} device, but the tensors are on {device}")
        return chosen
    if device.type == "xpu":
        return Queue.from_address(torch.xpu.current_stream(device).sycl_queue)
    if device.type == "cpu":
        return _cpu_queue()
    raise TypeError(f"moe_xe runs on xpu and cpu tensors, got a tensor on {device}")


def _reaches(facts: DeviceFacts, device: torch.device) -> bool:
    """Whether kernels of a SYCL device can use torch's memory on `device`; what USM shares with the host is not torch's."""
    if facts.kind == "gpu":
        return device.type == "xpu" or device.type == "cpu" and facts.has_system_memory
    return device.type == "cpu"


def on_torchs_stream() -> bool:
    """Whether calls run where torch's events on this thread see them: not on a queue chosen with `on_queue`."""
    return _chosen.get() is None


_facts: Once[DeviceFacts] = Once()


def facts_of(queue: Queue) -> DeviceFacts:
    """Facts about the queue's device, asked for once a device."""
    return _facts.get(queue.device_id, lambda: queue.device)


@contextmanager
def on_queue(queue):
    """Runs moe_xe's calls within the block on this queue.

    queue: a dpctl.SyclQueue or a moe_xe Queue, in order (dpctl: ``dpctl.SyclQueue(property="in_order")``); no address, which
    nobody could check. Calls on xpu tensors return before the work is done, as torch's do. On a GPU's queue CPU tensors are refused
    unless the GPU reaches all memory of the process (DeviceFacts.has_system_memory).
    Raises TypeError for anything else, ValueError for an out-of-order queue.
    """
    if isinstance(queue, Queue):
        own = queue
    elif hasattr(queue, "_get_capsule"):
        own = Queue.from_capsule(queue._get_capsule())
    else:
        raise TypeError(f"queue must be a dpctl.SyclQueue or a moe_xe Queue, got {type(queue).__name__}")
    token = _chosen.set(own)
    try:
        yield own
    finally:
        _chosen.reset(token)
