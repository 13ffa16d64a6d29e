"""Makes the SYCL CPU device visible, with nothing for the user to set.

The wheel intel-opencl-rt brings the CPU's OpenCL driver, but the file that
should announce it holds a placeholder path. The OpenCL loader also reads
OCL_ICD_FILENAMES, once, when devices are first looked for: setting it before
then is enough, even if libsycl has long been loaded (by dpctl or torch).
"""
from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

_VARIABLE = "OCL_ICD_FILENAMES"
_DRIVER = "libintelocl.so"


def find_cpu_driver() -> Path | None:
    """The CPU's OpenCL driver, or None where intel-opencl-rt is not installed."""
    candidates = [Path(sys.prefix) / "lib" / _DRIVER]
    try:
        files = importlib.metadata.files("intel-opencl-rt") or []
        candidates[:0] = [Path(file.locate()) for file in files if file.name == _DRIVER]
    except importlib.metadata.PackageNotFoundError:
        pass
    return next((path.resolve() for path in candidates if path.exists()), None)


def announce_cpu_driver() -> None:
    """Adds the driver to what the user may have set; a second call changes nothing."""
    driver = find_cpu_driver()
    if driver is None:
        return
    listed = [entry for entry in os.environ.get(_VARIABLE, "").split(os.pathsep) if entry]
    if not any(os.path.realpath(entry) == str(driver) for entry in listed):
        os.environ[_VARIABLE] = os.pathsep.join([*listed, str(driver)])
