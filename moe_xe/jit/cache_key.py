"""Everything that a compiled kernel depends on, or a choice between kernels."""
from __future__ import annotations

import functools
import hashlib
import importlib.metadata

from ..disk_cache import Facts
from ..runtime import DeviceFacts, cpu_isa
from .kernel_source import KernelSource
from .shipped_sources import sources_digest


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def key_facts(source: KernelSource, device: DeviceFacts) -> Facts:
    """What this kernel's binary depends on."""
    return {
        "kernel": source.name,
        "signature": source.signature,
        "text": hashlib.sha256(source.text.encode()).hexdigest(),
        "options": list(source.options),
        **environment_facts(device),
    }


def environment_facts(device: DeviceFacts) -> dict[str, str]:
    """What every kernel depends on: the library, the compiler and the device."""
    return {
        "shipped_sources": sources_digest(),
        "moe_xe": _version("moe_xe"),
        "compiler": _version("intel-sycl-rt"),
        "backend": device.backend,
        "device": device.name,
        "architecture": device.architecture,
        "driver": device.driver_version,
        # Machines with equal device names may still differ in this.
        "cpu_isa": cpu_isa() if device.kind == "cpu" else "",
    }
