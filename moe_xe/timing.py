"""Timing of several ways to do the same, in turn, so that a busy machine slows all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock where it has one."""
    if device.type == "xpu":
        begin, end = torch.xpu.Event(enable_timing=True), torch.xpu.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


_BURST_SECONDS = 0.05


def interleaved_medians(calls: dict[Name, Callable[[], object]], device: torch.device, seconds: float,
                        min_rounds: int = 3, max_rounds: int = 200) -> dict[Name, float]:
    """Median seconds of each call; rounds of all of them in turn until `seconds` have passed.

    Short calls come in bursts behind an untimed one: OpenMP's threads spin on for milliseconds after torch's call, on the
    cores that the next one needs, and a thread pool that has gone to sleep wakes up slowly.
    """
    for call in calls.values():
        call()
    times: dict[Name, list[float]] = {name: [timed(call, device)] for name, call in calls.items()}
    begin = time.perf_counter()
    for done in range(1, max_rounds + 1):
        for name, call in calls.items():
            burst = min(50, int(_BURST_SECONDS / times[name][-1]))
            if burst > 1:
                call()
            times[name] += [timed(call, device) for _ in range(max(1, burst))]
        if done >= min_rounds and time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}
