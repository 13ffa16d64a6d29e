"""The payload of a launch: what the runtime hands to every thread, laid out as .ze_info asks."""
import struct

import numpy as np

from .memory import Local
from .native import SimError


def value_bytes(value, size, offset=0):
    """`size` bytes of a by-value argument from `offset`: numpy scalar, bytes (a struct), int, float; None is the null pointer."""
    if value is None:
        raw = bytes(size)
    elif isinstance(value, (bytes, bytearray)):
        raw = bytes(value)
    elif isinstance(value, np.generic):
        if value.nbytes != size and not offset:
            raise SimError(f"{value!r} has {value.nbytes} bytes, the kernel's argument has {size}")
        raw = value.tobytes()
    elif isinstance(value, np.ndarray):
        raw = value.tobytes()
    elif isinstance(value, float):
        raw = struct.pack("<f" if size == 4 else "<d", value)
    else:
        raw = int(value).to_bytes(8, "little", signed=int(value) < 0)
    raw = raw[offset:offset + size]
    return raw + bytes(size - len(raw))


class Payload:
    """Cross-thread data of a launch.

    info: the kernel's .ze_info record; args: by position; local, groups: three sizes, the fastest dimension first.
    threads: how many can be resident (each has its own private memory); data_address: of a data section.
    data: the bytes; slm: bytes of local memory of a work-group, arguments of kind Local included.
    """
    def __init__(self, info, args, mem, dims, local, groups, threads, data_address, names=None):
        environment = info["execution_env"]
        self.slm = environment.get("slm_size", 0)
        self._args, self._mem, self._names, self._local_offset = args, mem, names, {}
        triple = lambda v: struct.pack("<3I", *v)
        records = info.get("payload_arguments") or []
        self.data = bytearray(max([a["offset"] + a["size"] for a in records] or [0]))
        for a in records:
            kind, size = a["arg_type"], a["size"]
            if kind in ("arg_bypointer", "arg_byvalue"):
                raw = self._argument(a)
            elif kind in ("local_size", "enqueued_local_size"):
                raw = triple(local)
            elif kind == "group_count":
                raw = triple(groups)
            elif kind == "global_size":
                raw = triple([x * y for x, y in zip(local, groups)])
            elif kind == "global_id_offset":
                raw = triple([0, 0, 0])
            elif kind == "work_dimensions":
                raw = struct.pack("<I", dims)
            elif kind == "private_base_stateless":
                private = np.zeros((threads + 1) * _private_bytes(info), np.uint8)
                raw = value_bytes(mem.map(private, "private memory"), size)
            elif kind in ("const_base", "global_base"):
                raw = value_bytes(data_address(".data.const" if kind == "const_base" else ".data.global"), size)
            elif kind == "buffer_offset":
                raw = bytes(size)
            else:
                raise SimError(f"payload argument {kind} is not supported")
            if len(raw) < size:
                raise SimError(f"payload argument {kind}: {len(raw)} bytes for {size}")
            self.data[a["offset"]:a["offset"] + size] = raw[:size]

    def _argument(self, a):
        i, size = a["arg_index"], a["size"]
        if i >= len(self._args):
            raise SimError(f"argument {i} is missing")
        value = self._args[i]
        if isinstance(value, Local):
            if i not in self._local_offset:
                self._local_offset[i] = -(-self.slm // 64) * 64
                self.slm = self._local_offset[i] + value.nbytes
            return value_bytes(self._local_offset[i], size)
        if isinstance(value, np.ndarray) and value.ndim and (a["arg_type"] == "arg_bypointer" or a.get("is_ptr")):
            if a.get("addrmode", "stateless") != "stateless":
                raise SimError("stateful pointer argument")
            return value_bytes(self._mem.map(value, self._names[i] if self._names else f"arg{i}"), size)
        try:
            return value_bytes(value, size, a.get("source_offset", 0))
        except SimError as e:
            raise SimError(f"argument {i}: {e}") from None


def _private_bytes(info):
    """Bytes of private memory of one hardware thread."""
    environment = info["execution_env"]
    buffers = [b for b in info.get("per_thread_memory_buffers", []) if b["type"] == "global" and b["usage"] == "private_space"]
    size = sum(b["size"] * (environment["simd_size"] if b.get("is_simt_thread") else 1) for b in buffers)
    return max(size, environment.get("private_size", 0))
