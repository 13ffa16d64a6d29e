"""The roofline of the device at hand: a published record for a GPU, one measurement for the CPU device."""
from __future__ import annotations

import json
import math

import torch

from ..device import DeviceFacts, facts_of, queue_for
from ..disk_cache import DiskCache, cache_directory
from ..jit import KernelSource, compile_kernel
from ..once import once
from ..plan.gemm.config import VECTOR_DWORDS
from ..plan.gemm.heuristics import fast_isa
from ..plan.model.devices import DeviceRecord, find_record
from ..plan.problem import FLOATS, Dtype
from ..runtime import cpu_isa
from ..timing import timed

_MM_SIZE = 768     # enough for torch.mm's full rate


@once
def record_for(device: torch.device) -> DeviceRecord | None:
    """None for a GPU without a record."""
    facts = facts_of(queue_for(device))
    return find_record(facts.name) if facts.kind == "gpu" else _cpu_record(facts)


def device_cache() -> DiskCache:
    """What was measured of devices."""
    return DiskCache(cache_directory() / "devices", 1 << 20)


def _cpu_record(facts: DeviceFacts) -> DeviceRecord:
    """Measured once on a machine, then kept on disk."""
    disk = device_cache()
    key = {"device": facts.name, "driver": facts.driver_version, "cores": facts.compute_units, "cpu_isa": cpu_isa(),
           "torch": torch.__version__}
    if (record := _kept_record(disk.load(key))) is not None:
        return record
    record = _measured_cpu(facts.name, facts.compute_units)
    disk.store(key, json.dumps({name: getattr(record, name) for name in _MEASURED}).encode())
    return record


# the fields of a DeviceRecord that say something about a CPU
_MEASURED = {"name": str, "xe_cores": int, "tflops": dict, "bandwidth": float, "source": str}


def _kept_record(value: bytes | None) -> DeviceRecord | None:
    """None if there is none, or of a version with other fields."""
    try:
        fields = json.loads(value or b"null")
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or {name: type(field) for name, field in fields.items()} != _MEASURED:
        return None
    rates = fields["tflops"]
    measured = rates.keys() == {dtype.value for dtype in FLOATS} and all(type(rate) is float for rate in rates.values())
    return DeviceRecord(**fields) if measured and all(0 < rate < math.inf for rate in (*rates.values(), fields["bandwidth"])) else None


def _measured_cpu(name: str, cores: int) -> DeviceRecord:
    """Peaks: the multiply-add units' own rate, or torch.mm's where it is higher (AMX); bandwidth: of a copy."""
    device = torch.device("cpu")
    block = torch.ones(64 << 20, dtype=torch.float32)
    target = torch.empty_like(block)
    copy = min(timed(lambda: target.copy_(block), device) for _ in range(5))
    isa = fast_isa(cpu_isa(), name)
    units = _fma_tflops(VECTOR_DWORDS[isa], 24 if VECTOR_DWORDS[isa] == 16 else 12, cores)
    rates = {}
    for dtype, torch_dtype in ((Dtype.bf16, torch.bfloat16), (Dtype.f16, torch.float16), (Dtype.f32, torch.float32)):
        x, y = torch.randn(2, _MM_SIZE, _MM_SIZE, dtype=torch_dtype)
        mm = 2 * _MM_SIZE**3 / min(timed(lambda: x @ y, device) for _ in range(3)) / 1e12
        pairs = 2 if dtype is Dtype.bf16 and isa == "avx512_bf16" else 1     # one instruction multiplies pairs
        rates[dtype.value] = max(mm, pairs * units)
    return DeviceRecord(name, cores, rates, 2 * block.nbytes / copy / 1e9, "measured: multiply-add units, torch.mm, a copy")


def _fma_tflops(width: int, chains: int, cores: int) -> float:
    """1e12 float32 operations a second, `chains` independent vectors of `width` on each core."""
    queue = queue_for(torch.device("cpu"))
    source = KernelSource("fma_peak", "pi", f"#define MOE_XE_WIDTH {width}\n#define MOE_XE_CHAINS {chains}\n#include <kernels/fma_peak.cpp>\n")
    kernel = compile_kernel(queue, source)
    sums, rounds = torch.zeros(cores, dtype=torch.float32), 20_000_000

    def run():
        kernel.launch(queue, cores, 1, (sums.data_ptr(), rounds))
        queue.wait()

    return 2 * rounds * width * chains * cores / min(timed(run, torch.device("cpu")) for _ in range(4)) / 1e12


def gemm_bytes(tokens_per_expert: list[int], n: int, k: int, in_size: int, out_size: int, weight_bytes: float | None = None) -> int:
    """Bytes that a grouped GEMM must move at least: rows in and out, and the weights of experts that have rows. weight_bytes: of one, by
    default in_size."""
    rows, active = sum(tokens_per_expert), sum(r > 0 for r in tokens_per_expert)
    return round(rows * k * in_size + active * n * k * (weight_bytes or in_size) + rows * n * out_size)
