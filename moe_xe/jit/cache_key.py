"""Everything that a compiled kernel depends on."""
from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json

from .kernel_source import KernelSource
from .shipped_sources import sources_digest
from ..runtime import DeviceFacts, cpu_isa

KeyFacts = dict[str, str | list[str]]


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def key_facts(source: KernelSource, device: DeviceFacts) -> KeyFacts:
    return {
        "kernel": source.name,
        "signature": source.signature,
        "text": hashlib.sha256(source.text.encode()).hexdigest(),
        "options": list(source.options),
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


def key_of(facts: KeyFacts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
