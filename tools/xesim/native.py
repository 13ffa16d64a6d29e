"""Builds the C++ core on first use and declares its C interface."""
import ctypes as C
import functools
import hashlib
import os
import subprocess
from pathlib import Path

from moe_xe.private_folder import open_private

CORE = Path(__file__).resolve().parent / "core"
# -frounding-math: kernels switch the rounding mode through cr0
FLAGS = ["-std=c++20", "-O2", "-march=native", "-frounding-math", "-fno-math-errno", "-Wall", "-Wextra", "-shared", "-fPIC"]


class SimError(RuntimeError):
    """The kernel did what hardware does not allow, or something that is not simulated; the message says what and where."""


class Launch(C.Structure):
    """Mirrors Launch of exec.h."""
    _fields_ = [("groups", C.c_uint32 * 3), ("local", C.c_uint32 * 3),
                ("simd", C.c_uint32), ("slm", C.c_uint32), ("scratch", C.c_uint32), ("inline_size", C.c_uint32),
                ("cross_mem", C.c_uint32), ("per_thread", C.c_uint32), ("n_ids", C.c_uint32), ("entry", C.c_uint32),
                ("heap_base", C.c_uint64), ("seed", C.c_uint64), ("max_ins", C.c_uint64),
                ("max_groups", C.c_uint32), ("quantum", C.c_uint32),
                ("walk", C.c_uint8 * 4), ("pad", C.c_uint32)]


def build():
    """The shared library of the core, built on first use (and again whenever a source or this machine's CPU differs)."""
    sources, headers = sorted(CORE.glob("*.cpp")), sorted(CORE.glob("*.h"))
    h = hashlib.sha256(" ".join(FLAGS).encode())
    for f in sources + headers:
        h.update(f.read_bytes())
    h.update(next((l for l in open("/proc/cpuinfo") if l.startswith("flags")), "").encode())
    out = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "xesim", "build", f"libxesim-{h.hexdigest()[:16]}.so")
    os.close(open_private(out.parent, create=True))      # it is loaded into this process
    if not out.exists():
        tmp = out.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, "-o", tmp, *sources], check=True)
        tmp.rename(out)
    return out


def _load():
    lib = C.CDLL(str(build()))
    p, u32, u64, s = C.c_void_p, C.c_uint32, C.c_uint64, C.c_char_p
    for name, res, args in [
            ("xs_error", s, []), ("xs_prog_new", p, []), ("xs_prog_free", None, [p]), ("xs_prog_parse", C.c_int, [p, s, u32]),
            ("xs_prog_patch", C.c_int, [p, u32, u32]), ("xs_prog_extern", None, [p, u32, s]), ("xs_prog_size", C.c_int, [p]),
            ("xs_mem_new", p, []), ("xs_mem_free", None, [p]),
            ("xs_mem_map", C.c_int, [p, u64, u64, p, C.c_int, s]), ("xs_mem_unmap", None, [p, u64]),
            ("xs_run", C.c_int, [p, p, C.POINTER(Launch), s, u32, p, p, C.POINTER(u64), C.POINTER(C.c_double)]),
            ("xs_warnings", s, [])]:
        f = getattr(lib, name)
        f.restype, f.argtypes = res, args
    return lib


@functools.cache
def lib():
    """The loaded core."""
    return _load()
