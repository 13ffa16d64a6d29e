"""The host runtime: SYCL queues, device facts, kernels compiled at run time.

The only importer of the extension module, so that the CPU device is announced
before anything looks for devices and a missing library is explained in one
place.
"""
from __future__ import annotations

from . import _icd

_icd.announce_cpu_driver()

try:
    from ._runtime import (
        AsyncError,
        BinaryError,
        CompileError,
        DeviceFacts,
        DeviceLostError,
        DeviceNotFoundError,
        ForkError,
        Kernel,
        LaunchSequence,
        Platform,
        Queue,
        cpu_isa,
        devices,
        platforms,
    )
except ImportError as error:
    if "libsycl" in str(error):
        hint = "libsycl, the SYCL runtime, cannot be loaded: pip install 'intel-sycl-rt>=2026.0'"
    else:
        hint = "moe_xe's extension module is not built: pip install it, or run make venv in the repository"
    raise ImportError(f"{hint} ({error})") from error

__all__ = [
    "AsyncError",
    "BinaryError",
    "CompileError",
    "DeviceFacts",
    "DeviceLostError",
    "DeviceNotFoundError",
    "ForkError",
    "Kernel",
    "LaunchSequence",
    "Platform",
    "Queue",
    "cpu_isa",
    "devices",
    "platforms",
]
