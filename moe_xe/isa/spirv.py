"""SYCL source -> SPIR-V, with the run-time compiler of libsycl in a process of its own.

The compiler hands out no SPIR-V for code that this machine's device cannot run (dpas, 2D block messages), but libsycl
writes every image to disk when SYCL_DUMP_IMAGES is set. A process of its own because libsycl may crash after that.
"""
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Sequence

ONE_IMAGE = "-fsycl-device-code-split=off"


class CompileError(RuntimeError):
    """The source did not compile; the message holds the compiler's diagnostics."""


def compile_to_spirv(source: str, options: Sequence[str] = ()) -> bytes:
    """Compiles SYCL source text and returns one SPIR-V module that holds all of its kernels.

    options: one string per option of the run-time compiler (-D..., -I..., -O2, ...); folders must be absolute, the
    compiler runs in a temporary one. The same source and options give the same bytes.
    Raises CompileError if the source has errors, FileNotFoundError if a part of the toolchain is missing.
    """
    if reason := missing():
        raise FileNotFoundError(reason)
    # what users set for their own devices must not matter: a cached compilation, for one, gives other bytes
    env = dict(os.environ, SYCL_DUMP_IMAGES="1", SYCL_CACHE_PERSISTENT="0", OCL_ICD_FILENAMES=str(_opencl_cpu_device()))
    env.pop("ONEAPI_DEVICE_SELECTOR", None)
    with tempfile.TemporaryDirectory(prefix="moe_xe-spirv-") as folder:
        path = Path(folder, "source.cpp")
        path.write_text(source)
        done = subprocess.run([_compiler(), path, *options, ONE_IMAGE], cwd=folder, env=env, text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        images = sorted(Path(folder).glob("sycl_spir64*.spv"))
        # the status says little: libsycl crashes, or complains about the CPU device, after a good image was written
        if not images:
            raise CompileError(f"the SYCL compiler wrote no SPIR-V (exit status {done.returncode}):\n{done.stdout}")
        if len(images) > 1:
            raise CompileError(f"{len(images)} images instead of one: some option splits the device code")
        return images[0].read_bytes()


def missing() -> str:
    """What compile_to_spirv lacks on this machine, and how to get it; "" if nothing."""
    if _compiler() is None:
        return "spirv_compiler is not in moe_xe/bin: moe_xe was imported without being built (pip install .)"
    if _opencl_cpu_device() is None:
        return "libintelocl.so was not found: pip install intel-opencl-rt"
    return ""


def _compiler() -> Path | None:
    folders = sys.modules[__package__.partition(".")[0]].__path__   # several for an editable install
    return next((path for folder in folders if (path := Path(folder, "bin", "spirv_compiler")).exists()), None)


def _opencl_cpu_device() -> Path | None:
    """The OpenCL CPU device of the wheel, wherever pip put it; its own ICD file names a folder that does not exist."""
    try:
        files = importlib.metadata.files("intel-opencl-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()).resolve() for f in files if f.name == "libintelocl.so"), None)
