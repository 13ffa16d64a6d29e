import os
from pathlib import Path

import dpctl
import pytest

from moe_xe.runtime import cpu_isa, devices


def test_facts_agree_with_dpctl(queue, kind):
    facts, theirs = queue.device, dpctl.SyclDevice(kind)
    assert (facts.kind, facts.backend) == (kind, theirs.backend.name)
    assert facts.name == theirs.name
    assert facts.vendor == theirs.vendor
    assert facts.driver_version == theirs.driver_version
    assert facts.compute_units == theirs.max_compute_units
    assert facts.xe_cores == (facts.compute_units if kind == "cpu" else 20)
    assert list(facts.sub_group_sizes) == list(theirs.sub_group_sizes)
    assert facts.local_mem_bytes == theirs.local_mem_size
    assert facts.global_mem_bytes == theirs.global_mem_size
    assert facts.max_work_group_size == theirs.max_work_group_size
    assert facts.has_fp16 == theirs.has_aspect_fp16
    assert facts.has_atomic64 == theirs.has_aspect_atomic64
    assert facts.has_system_memory == theirs.has_aspect_usm_system_allocations
    assert facts.architecture in (("x86_64", "intel_cpu_spr", "intel_cpu_gnr", "intel_cpu_dmr") if kind == "cpu" else ("intel_gpu_bmg_g21",))


def test_device_list_has_the_cpu_last(queue):
    kinds = [facts.kind for facts in devices()]
    assert kinds == sorted(kinds, reverse=True) and kinds[-1] == "cpu"


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
def test_cpu_isa_agrees_with_the_kernel():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    avx512_bf16 = avx512 | {"avx512_bf16"}
    amx = avx512_bf16 | {"amx_tile", "amx_bf16"}
    steps = {"amx_fp16": amx | {"amx_fp16"}, "amx": amx, "avx512_bf16": avx512_bf16, "avx512": avx512, "avx2": avx2, "baseline": set()}
    assert cpu_isa() == next(name for name, needed in steps.items() if needed <= set(flags))      # unless tiles are forbidden to processes
