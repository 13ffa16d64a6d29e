"""Drivers that fail, for programs that tests run: compiled here, and named in the environment."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_xe import _icd

_SOURCES = Path(__file__).parent / "runtime"


def _compile(source: str, library: Path) -> Path:
    if not (compiler := shutil.which("g++")):
        pytest.skip("needs g++")
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", _SOURCES / source, "-o", library, f"-Wl,-soname,{library.name}"], check=True)
    return library


def level_zero(folder: Path, broken_function: str = "") -> dict[str, str]:
    """The environment in which Level Zero has one GPU, "Broken GPU", and this function of it fails."""
    _compile("broken_level_zero.cpp", folder / "libze_loader.so.1")
    return os.environ | {"ZEL_LIBRARY_PATH": str(folder), "BROKEN_FUNCTION": broken_function}


def opencl(folder: Path) -> dict[str, str]:
    """The environment in which one OpenCL driver, beside that of the CPU, cannot list its devices."""
    drivers = [_compile("broken_opencl.cpp", folder / "libbroken_opencl.so"), _icd.find_cpu_driver()]
    return os.environ | {"OCL_ICD_FILENAMES": os.pathsep.join(map(str, filter(None, drivers)))}
