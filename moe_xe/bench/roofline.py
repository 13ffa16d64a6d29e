"""The roofline of the device at hand: a published record for a GPU, a measurement for the CPU device."""
from __future__ import annotations

import functools

import torch

from ..device import facts_of, queue_for
from ..plan.devices import DeviceRecord, find_record
from ..plan.problem import Dtype
from .timing import timed


_MM_SIZE = 768     # enough for torch.mm's full rate


@functools.cache
def record_for(device: torch.device) -> DeviceRecord | None:
    """None for a GPU without a record."""
    facts = facts_of(queue_for(device))
    return find_record(facts.name) if facts.kind == "gpu" else _measured_cpu(facts.name, facts.compute_units)


def _measured_cpu(name: str, cores: int) -> DeviceRecord:
    device = torch.device("cpu")
    block = torch.ones(64 << 20, dtype=torch.float32)
    target = torch.empty_like(block)
    copy = min(timed(lambda: target.copy_(block), device) for _ in range(5))
    rates = {}
    for dtype, torch_dtype in ((Dtype.bf16, torch.bfloat16), (Dtype.f16, torch.float16), (Dtype.f32, torch.float32)):
        x, y = torch.randn(2, _MM_SIZE, _MM_SIZE, dtype=torch_dtype)
        rates[dtype.value] = 2 * _MM_SIZE**3 / min(timed(lambda: x @ y, device) for _ in range(3)) / 1e12
    # a CPU without native 16-bit arithmetic computes them in float32
    rates = {key: max(rate, rates["f32"]) for key, rate in rates.items()}
    return DeviceRecord(name, cores, rates, 2 * block.nbytes / copy / 1e9, "measured now: torch.mm and a copy of 256 MB")


def gemm_bytes(tokens_per_expert: list[int], n: int, k: int, in_size: int, out_size: int) -> int:
    """Bytes that a grouped GEMM must move at least: rows in and out, and the weights of experts that have rows."""
    rows, active = sum(tokens_per_expert), sum(r > 0 for r in tokens_per_expert)
    return rows * k * in_size + active * n * k * in_size + rows * n * out_size
