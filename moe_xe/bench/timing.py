"""Timing of several ways to do the same, interleaved, so that a busy machine slows all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


_REST_SECONDS = 0.01


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


def interleaved_medians(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float,
                        min_rounds: int = 3, max_rounds: int = 200) -> dict[str, float]:
    """Median seconds of each call; rounds of all of them in turn until `seconds` have passed.

    Before each call the machine rests: OpenMP's threads spin on for milliseconds after torch's call, on the cores that
    the next one needs.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(1, max_rounds + 1):
        for name, call in calls.items():
            time.sleep(_REST_SECONDS)
            times[name].append(timed(call, device))
        if done >= min_rounds and time.perf_counter() - begin > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}
