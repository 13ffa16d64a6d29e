"""Builds the C++ core on first use and declares its C interface."""
import ctypes as C
import functools
from pathlib import Path

from . import cxx

CORE = Path(__file__).resolve().parent / "core"
SOURCES, HEADERS = sorted(CORE.glob("*.cpp")), sorted(CORE.glob("*.h"))


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


def _load():
    lib = C.CDLL(str(cxx.build("libxesim.so", SOURCES, HEADERS)))
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
