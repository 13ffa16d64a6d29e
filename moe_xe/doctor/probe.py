"""The programs that `separately` runs: python -m moe_xe.doctor.probe loader | platforms | gemm <index>. Each prints one JSON object."""
from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path


def loader() -> dict:
    """Path and version of the Level Zero loader that the SYCL runtime opens."""
    name = os.path.join(os.environ.get("ZEL_LIBRARY_PATH", ""), "libze_loader.so.1")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        return {"error": str(error)}
    maps = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[5] for line in maps if "libze_loader.so" in line), name)
    try:
        library.zeLoaderInit()      # without it, and some without a driver, old ones give no version
        return {"path": path, "version": _loader_version(library) or path.partition(".so.")[2]}
    except AttributeError as error:
        return {"path": path, "error": str(error)}


class _Component(ctypes.Structure):
    """zel_component_version_t of Level Zero's interface."""
    _fields_ = [("name", ctypes.c_char * 64), ("interface", ctypes.c_uint32), ("version", ctypes.c_int * 3)]


def _loader_version(library: ctypes.CDLL) -> str:
    count = ctypes.c_size_t(0)
    library.zelLoaderGetVersionsInternal(ctypes.byref(count), None)
    components = (_Component * count.value)()
    library.zelLoaderGetVersionsInternal(ctypes.byref(count), components)
    return next((".".join(map(str, component.version)) for component in components if component.name == b"loader"), "")


def platforms() -> dict:
    """What each SYCL platform has, what moe_xe takes of it, and how many devices torch has."""
    import torch

    from .. import runtime

    return {"torch_xpu": torch.xpu.device_count(),
            "platforms": [{"name": platform.name, "backend": platform.backend, "errors": list(platform.errors),
                           "devices": [_device(facts) for facts in platform.devices]} for platform in runtime.platforms()],
            "devices": [_device(facts) for facts in runtime.devices()]}


def _device(facts) -> dict:
    return {"name": facts.name, "kind": facts.kind, "driver": facts.driver_version, "architecture": facts.architecture}


class _NotRun(Exception):
    """Something to install is missing; the message says what."""


COUNTS, N, K = [30, 0, 17, 5], 128, 128


def gemm(index: int) -> dict:
    """A small grouped GEMM on the device at this position of devices(): how far from the reference, and how long it took."""
    import torch

    from ..bench.numerics import agrees, difference, reference_grouped_gemm

    torch.manual_seed(0)
    a, w = torch.randn(sum(COUNTS), K).bfloat16(), torch.randn(len(COUNTS), N, K).bfloat16()
    try:
        memory, call = _way(index, a, w)
    except _NotRun as error:
        return {"not_run": str(error)}
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        out = call()
        seconds.append(time.perf_counter() - begin)
    reference = reference_grouped_gemm(a, w, COUNTS)
    found = difference(out, reference)
    return {"memory": memory, "correct": agrees(out, reference, K), "max_error": found.max_error, "calc_diff": found.calc_diff,
            "first_ms": 1e3 * seconds[0], "later_ms": 1e3 * seconds[-1]}


def _way(index: int, a, w):
    """(whose memory, a function that gives the result on the CPU). Raises _NotRun."""
    import torch

    from .. import grouped_gemm, on_queue, runtime

    counts = torch.tensor(COUNTS, dtype=torch.int32)
    all_facts = runtime.devices()
    facts = all_facts[index]
    queue = runtime.Queue.create(index)     # the first thing that fails on a device, with more words than others have for it
    if facts.kind == "cpu":
        def on_cpu():
            with on_queue(queue):
                return grouped_gemm(a, w, counts)

        return "torch's, on the CPU", on_cpu
    twin = [other.name for other in all_facts[:index]].count(facts.name)      # cards of one name are in the same order everywhere
    streams = [torch.xpu.current_stream(torch.device("xpu", xpu)) for xpu in range(torch.xpu.device_count())]
    named = [xpu for xpu, stream in enumerate(streams) if runtime.Queue.from_address(stream.sycl_queue).device.name == facts.name]
    if twin < len(named):
        x, weights, rows = (tensor.to(f"xpu:{named[twin]}") for tensor in (a, w, counts))
        return "torch's, on xpu", lambda: grouped_gemm(x, weights, rows).cpu()
    return "dpctl's, shared USM: torch has no XPU device for it", _with_dpctl(facts, twin, a, w, counts)


def _with_dpctl(facts, twin: int, a, w, counts):
    """The GEMM on memory of dpctl's. Such tensors are no business of the public calls, which know torch's devices."""
    import torch

    from .. import runtime
    from ..ops.launch import Call, submit
    from ..ops.submission import Submission
    from ..plan.launch import QUEUE_WORDS

    try:
        import dpctl
        import dpctl.memory
    except ImportError as error:
        raise _NotRun(f"torch {torch.__version__} has no XPU device for it: install an XPU build of torch, or dpctl ({error})") from error
    named = [device for device in dpctl.get_devices(backend=facts.backend, device_type="gpu") if device.name == facts.name]
    theirs = dpctl.SyclQueue(named[twin], property="in_order")
    queue = runtime.Queue.from_capsule(theirs._get_capsule())

    def shared(tensor):
        copy = torch.frombuffer(dpctl.memory.MemoryUSMShared(tensor.nbytes, queue=theirs), dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    class InSharedMemory(Submission):
        """What its launches use in between is USM, too."""

        def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            memory = shared(torch.empty(shape, dtype=dtype))
            self.keep(memory)
            return memory

        def zeros(self, length: int) -> torch.Tensor:
            return self.empty(length, dtype=torch.int32).zero_()

    call, out = Call(shared(a), shared(w), shared(counts), sum(COUNTS)), shared(torch.zeros(sum(COUNTS), N).to(a.dtype))

    def on_gpu():
        with InSharedMemory(queue, out.device) as submission:
            submit(submission, call, out, submission.zeros(QUEUE_WORDS))
        return out

    return on_gpu


def main(arguments: list[str]) -> dict:
    """The object for the command line. Everything that Python raises is its "error"."""
    try:
        return {"loader": loader, "platforms": platforms, "gemm": lambda index: gemm(int(index))}[arguments[0]](*arguments[1:])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])), flush=True)
