"""What can be read of the machine and the installation without touching a driver. Every function gives {label: text}."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

_PREFIXES = ("DPCTL_", "IGC_", "MOE_XE_", "NEO", "OCL_ICD_", "ONEAPI_", "SYCL_", "UR_", "ZE")
_OTHERS = ("LD_LIBRARY_PATH",)
_DISTRIBUTIONS = ("intel-sycl-rt", "intel-cmplr-lib-ur", "intel-opencl-rt", "dpctl", "numpy", "transformers")
_RENDER = Path("/dev/dri")
_SYSFS = Path("/sys/class/drm")


def system() -> dict[str, str]:
    from ..runtime import cpu_isa

    return {"system": f"{_distribution()}, {platform.system()} {platform.release()} {platform.machine()}", "libc": " ".join(platform.libc_ver()),
            "processor": f"{_processor()}, {os.cpu_count()} threads, {cpu_isa()}", **_cards(_RENDER, _SYSFS)}


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _processor() -> str:
    try:
        return re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        return "unknown"


def _cards(render: Path, sysfs: Path) -> dict[str, str]:
    """The nodes through which Level Zero opens cards."""
    nodes = sorted(render.glob("renderD*"))
    if not nodes:
        return {str(render): "no render node: the kernel has no driver for a GPU here, or a container does not pass /dev/dri on"}
    return {str(node): f"{_card(sysfs / node.name / 'device')}, {_access(node)}" for node in nodes}


def _card(device: Path) -> str:
    try:
        ids = ":".join((device / name).read_text().strip().removeprefix("0x") for name in ("vendor", "device"))
        return f"{ids}, driver {(device / 'driver').resolve().name}"
    except OSError:
        return "unknown card"


def _access(node: Path) -> str:
    if os.access(node, os.R_OK | os.W_OK):
        return "accessible"
    return f"NOT accessible: add the user to the group that owns it ({_group(node)})"


def _group(node: Path) -> str:
    try:
        return node.group()
    except (KeyError, OSError):
        return "unknown"


def versions() -> dict[str, str]:
    import torch

    from .. import __version__
    from ..isa import ocloc

    found = {"Python": f"{platform.python_version()}, {sys.executable}", "moe_xe": f"{__version__}, {Path(__file__).parents[1]}",
             "torch": f"{torch.__version__}, {'a build without XPU' if getattr(torch.version, 'xpu', None) is None else 'an XPU build'}"}
    found |= {name: _version(name) for name in _DISTRIBUTIONS}
    return found | {"libsycl": _libsycl(), "UR adapters": _adapters(), "ocloc": _ocloc(ocloc.find())}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _libsycl() -> str:
    """The one that this process has loaded, which may be another than the wheel's."""
    return next((line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/libsycl.so" in line), "not loaded")


def _adapters() -> str:
    folder = Path(_libsycl()).parent
    names = sorted(path.name for path in folder.glob("libur_adapter_*.so.*.*"))
    return ", ".join(names) or f"none in {folder}"


def _ocloc(command: list[str] | None) -> str:
    if command is None:
        return "not found (only moe-xe isa needs it)"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
        said = (done.stdout or done.stderr).split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    return f"{command[-1]}: {said}"


def variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES) or name in _OTHERS} or {"set": "none"}


def cache() -> dict[str, str]:
    from ..disk_cache import cache_directory
    from ..jit.compiler import kernel_cache
    from ..tuning import default_store

    try:
        folder = str(cache_directory())
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            sizes = {"kernels": kernel_cache().volume(), "tuning": default_store().disk.volume()}
    except (RuntimeWarning, OSError, ValueError) as error:
        return {"folder": f"NOT usable: {error}"}
    return {"folder": f"{folder}, usable", **{name: f"{size / 1e6:.1f} MB" for name, size in sizes.items()}}
