"""Memory: how much there is, and how much a call takes at its peak."""
from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch

# left for the process itself, its code and its threads
_HEADROOM = 1 << 30


def available_bytes(device: torch.device) -> int:
    """What tensors can still take, without swapping and with a gibibyte left over."""
    if device.type == "xpu":
        free = torch.xpu.mem_get_info(device)[0]
    else:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
    return max(0, free - _HEADROOM)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that one call holds at a time of torch's allocator, its result included; what existed before is not.

    Scratch memory that a library takes past torch's allocator is not seen.
    """
    if device.type == "xpu":
        before = torch.xpu.memory_allocated(device)
        torch.xpu.reset_peak_memory_stats(device)
        call()
        torch.xpu.synchronize(device)
        return torch.xpu.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")    # or the profiler reports its start and end on stderr
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)
