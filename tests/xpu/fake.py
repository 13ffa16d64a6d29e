"""torch.xpu on the first SYCL GPU where torch was built without it: backend.cpp, and the functions of torch.xpu that are used.

For tests of what happens to xpu tensors: dispatch, streams, memory. Nothing is fast: operators of torch's run on the CPU.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import types
from pathlib import Path

import torch

from xesim import cxx

SOURCE = Path(__file__).with_name("backend.cpp")


def build() -> Path:
    """The backend's library, built on first use (half a minute)."""
    torch_root, prefix = Path(torch.__file__).parent, Path(sys.prefix)
    folders = [torch_root / "include", torch_root / "include/torch/csrc/api/include", prefix / "include"]
    libraries = [torch_root / "lib", prefix / "lib"]
    return cxx.build(
        "libfake_xpu.so", [SOURCE], [torch_root / "version.py", prefix / "include/sycl/version.hpp"],
        ["-O1", *(word for folder in folders for word in ("-isystem", str(folder)))],
        [*(f"-L{folder}" for folder in libraries), *(f"-Wl,-rpath,{folder}" for folder in libraries), "-ltorch", "-ltorch_cpu", "-lc10", "-lsycl"])


class Stream:
    """As torch.xpu.Stream; there are three, which new ones share in turn, but for the first: that is the default one."""

    _backend: ctypes.CDLL
    _next = 0

    def __init__(self, device=None, number: int | None = None):
        if number is None:
            number = 1 + Stream._next % (self._backend.fake_xpu_streams() - 1)
            Stream._next += 1
        self.number, self.device = number, torch.device("xpu", 0)

    @property
    def sycl_queue(self) -> int:
        return self._backend.fake_xpu_queue(self.number)

    def synchronize(self) -> None:
        before = current_stream()
        with stream(self):
            event = Event()
            event.record()
            event.synchronize()
        assert current_stream().number == before.number


class Event:
    """As torch.xpu.Event."""

    _backend: ctypes.CDLL

    def __init__(self, enable_timing: bool = False):
        self._handle = None

    def record(self, stream: Stream | None = None) -> None:
        self._forget()
        with contextlib.nullcontext() if stream is None else globals()["stream"](stream):
            self._handle = self._backend.fake_xpu_record()

    def synchronize(self) -> None:
        self._backend.fake_xpu_wait(self._handle)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (self._backend.fake_xpu_end_of(end._handle) - self._backend.fake_xpu_end_of(self._handle)) * 1e-6

    def _forget(self) -> None:
        if self._handle is not None:
            self._backend.fake_xpu_forget(self._handle)

    __del__ = _forget


def current_stream(device=None) -> Stream:
    return Stream(number=Stream._backend.fake_xpu_current_stream())


@contextlib.contextmanager
def stream(chosen: Stream):
    before = current_stream()
    Stream._backend.fake_xpu_set_stream(chosen.number)
    try:
        yield
    finally:
        Stream._backend.fake_xpu_set_stream(before.number)


def install() -> None:
    """Makes device="xpu" work in this process. There must be a SYCL GPU, whose memory the host need not reach."""
    path = build()
    torch.ops.load_library(path)
    backend = ctypes.CDLL(str(path))
    for name, result, arguments in [("streams", "size_t", ()), ("queue", "void_p", ("size_t",)), ("current_stream", "size_t", ()),
                                    ("set_stream", None, ("size_t",)), ("synchronize", None, ()), ("used_bytes", "size_t", ()),
                                    ("peak_bytes", "size_t", ()), ("reset_peak", None, ()), ("record", "void_p", ()),
                                    ("forget", None, ("void_p",)), ("wait", None, ("void_p",)), ("end_of", "uint64", ("void_p",))]:
        function = getattr(backend, f"fake_xpu_{name}")
        function.restype = result and getattr(ctypes, f"c_{result}")
        function.argtypes = [getattr(ctypes, f"c_{argument}") for argument in arguments]
    Stream._backend = Event._backend = backend

    one = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "is_current_stream_capturing": False,
           "mem_get_info": (8 << 30, 12 << 30), "_lazy_init": None, "init": None, "empty_cache": None,
           "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,     # random numbers are the CPU's
           "get_device_properties": types.SimpleNamespace(name="simulated", has_fp16=True, has_fp64=True, total_memory=12 << 30)}
    for name, answer in one.items():
        setattr(torch.xpu, name, lambda *_, answer=answer, **__: answer)
    for name in ("_xpu_getDevice", "_xpu_exchangeDevice", "_xpu_maybeExchangeDevice", "_xpu_setDevice"):
        setattr(torch._C, name, lambda *_: 0)
    torch.xpu.Stream, torch.xpu.Event, torch.xpu.stream, torch.xpu.current_stream = Stream, Event, stream, current_stream
    # There is no Triton for it, so compiled graphs run as they are traced.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    torch.xpu.device = lambda _: contextlib.nullcontext()
    torch.xpu.synchronize = lambda _=None: backend.fake_xpu_synchronize()
    torch.xpu.memory_allocated = lambda _=None: backend.fake_xpu_used_bytes()
    torch.xpu.max_memory_allocated = lambda _=None: backend.fake_xpu_peak_bytes()
    torch.xpu.reset_peak_memory_stats = lambda _=None: backend.fake_xpu_reset_peak()
