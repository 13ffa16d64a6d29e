"""Loads a kernel of an ocloc dump and runs it."""
import ctypes as C
import re
import weakref

import numpy as np

from moe_xe.isa import listing
from moe_xe.isa.dump import PREFIX, Dump

from .memory import Memory
from .native import Launch, SimError, lib
from .payload import Payload
from .stats import Stats

TEXT_BASE = 0x10000          # address of the first .text section
SECTION_SPAN = 0x1000000     # from one section to the next
DATA_BASE = 0x7D0000000000
EXTERN_BASE = 0xE0000000     # addresses of undefined functions, which the core emulates
HEAP_BASE = 0x7E0000000000
XE_CORE_EUS = 8
SLM_LIMIT = 131072
LOW_HALF, HIGH_HALF = 2, 3   # relocation types


class Kernel:
    """A kernel of a dump, ready to run. ins: its instructions, those of the functions it calls behind them."""
    def __init__(self, dump, name):
        self._dump = dump if isinstance(dump, Dump) else Dump(dump)
        try:
            self.info = self._dump.kernel(name)
        except KeyError as e:
            raise SimError(e.args[0]) from None
        self.symbol = self.info["name"]
        self.name = self.symbol.removeprefix(PREFIX)
        self.env = self.info["execution_env"]
        self._handle = lib().xs_prog_new()
        weakref.finalize(self, lib().xs_prog_free, self._handle)
        self.ins, self._bases, self._data, self._externs = [], {}, {}, {}
        self._load()

    @property
    def externs(self):
        """Functions that the kernel calls and nobody defines; the core emulates some."""
        return sorted(self._externs)

    # ------------------------------------------------------------ program
    def _load(self):
        todo, done = [f".text.{self.symbol}"], set()
        while todo:
            section = todo.pop(0)
            if section in done:
                continue
            done.add(section)
            base, text = self._text_address(section), self._dump.listing(section)
            self._check(lib().xs_prog_parse(self._handle, text.encode(), base))
            self.ins += listing.parse(text, base)
            for r in self._dump.relocations(section):
                if r.symbol.section.startswith(".text") and r.symbol.section not in done:
                    todo.append(r.symbol.section)
                value = self._address(r.symbol)
                if r.type not in (LOW_HALF, HIGH_HALF):
                    raise SimError(f"relocation type {r.type} of {r.symbol.name}")
                half = value >> 32 if r.type == HIGH_HALF else value & 0xFFFFFFFF
                self._check(lib().xs_prog_patch(self._handle, base + r.offset - 12, half))     # the last dword is patched
        if lib().xs_prog_size(self._handle) != len(self.ins):
            raise SimError("the two readers of the listing disagree")

    def _check(self, status):
        if status:
            raise SimError(lib().xs_error().decode())

    def _text_address(self, section):
        return self._bases.setdefault(section, TEXT_BASE + SECTION_SPAN * len(self._bases))

    def _address(self, symbol):
        if symbol.name.startswith("__INTEL_PATCH_CROSS_THREAD_OFFSET"):
            return 0
        if symbol.section.startswith(".text"):
            return self._text_address(symbol.section) + symbol.value
        if symbol.section.startswith((".data.", ".bss.")):
            return self._data_address(symbol.section) + symbol.value
        if symbol.section == "UNDEF":
            if symbol.name not in self._externs:
                self._externs[symbol.name] = EXTERN_BASE + 64 * len(self._externs)
                lib().xs_prog_extern(self._handle, self._externs[symbol.name], symbol.name.encode())
            return self._externs[symbol.name]
        raise SimError(f"relocation to {symbol}")

    def _data_address(self, section):
        """Address of .data.const, .bss.const, .data.global or .bss.global; the .bss part lies behind the data."""
        kind = "const" if section.endswith("const") else "global"
        path = self._dump.folder / f".data.{kind}"
        data = path.read_bytes() if path.exists() else b""
        size = -(-len(data) // 64) * 64
        if kind not in self._data:
            raw = np.zeros(size + 0x10000, np.uint8)      # the dump does not tell the size of .bss
            raw[:len(data)] = np.frombuffer(data, np.uint8)
            self._data[kind] = (DATA_BASE + 0x10000000 * len(self._data), raw)
        return self._data[kind][0] + (size if section.startswith(".bss") else 0)

    # ------------------------------------------------------------ launch
    def launch(self, global_size, local_size, args, seed=0, mem=None, max_groups=8, quantum=200,
               max_instructions=2_000_000_000, names=None):
        """Runs the kernel over an nd_range and returns Stats; sizes are in SYCL order (the last dimension is the fastest).

        args: any number, by position: numpy arrays become pointers (updated in place), None the null pointer, ints simulated
        addresses or scalars, numpy scalars (of the argument's exact size) and bytes go by value, Local(n) is work-group memory.
        max_groups work-groups are resident at a time; seed orders their threads, which run `quantum` instructions at most in a row.
        Raises SimError (its .stats: the counts so far) for what the hardware or this simulator does not do.
        """
        mem = mem or Memory()
        g, l = _sizes(global_size), _sizes(local_size)
        if len(g) != len(l) or any(a % b for a, b in zip(g, l)):
            raise SimError("the global size has to be a multiple of the local size")
        dims = len(g)
        local = l[::-1] + [1] * (3 - dims)
        groups = [a // b for a, b in zip(g, l)][::-1] + [1] * (3 - dims)
        n_groups = int(np.prod(groups))
        per_group = -(-int(np.prod(local)) // self.env["simd_size"])
        room = XE_CORE_EUS * self.env.get("eu_thread_count", 8)
        if per_group > room:
            raise SimError(f"{per_group} sub-groups in a work-group; with {self.env['grf_count']} GRFs an Xe core holds {room}")
        payload = Payload(self.info, args, mem, dims, local, groups, min(max_groups, n_groups) * per_group, self._data_address, names)
        for kind, (address, raw) in self._data.items():
            mem.map_fixed(raw, address, f".data.{kind}", readonly=kind == "const")
        P = self._launch(payload, local, groups)
        P.seed, P.max_ins, P.max_groups, P.quantum = seed, max_instructions, max_groups, quantum
        inst = np.zeros((len(self.ins), 3), np.uint64)
        threads = np.zeros((n_groups * per_group, 4), np.uint64)
        total, seconds = C.c_uint64(), C.c_double()
        failed = lib().xs_run(self._handle, mem.handle, C.byref(P), bytes(payload.data), len(payload.data), inst.ctypes.data, threads.ctypes.data,
                              C.byref(total), C.byref(seconds))
        error = lib().xs_error().decode()
        warnings = {text: int(n) for text, n in (x.split("\t") for x in lib().xs_warnings().decode().splitlines())}
        stats = Stats(self, inst, threads, total.value, seconds.value, warnings, n_groups)
        if "barrier" in stats.send_class and not self.env.get("barrier_count"):
            warnings["the kernel uses barriers but its barrier_count is 0"] = 1
        if payload.slm > SLM_LIMIT:
            warnings["more than 128 KiB of SLM"] = 1
        if failed:
            e = SimError(f"{self.name}: {error}")
            e.stats = stats
            raise e
        return stats

    def _launch(self, payload, local, groups):
        ids = self.info.get("per_thread_payload_arguments") or []
        if any(a["arg_type"] != "local_id" for a in ids):
            raise SimError(f"per-thread payload {ids}")
        P = Launch()
        P.groups[:], P.local[:], P.simd = groups, local, self.env["simd_size"]
        P.slm = payload.slm
        P.scratch = sum(b["size"] for b in self.info.get("per_thread_memory_buffers", []) if b["type"] == "scratch")
        P.inline_size = self.env.get("inline_data_payload_size", 0)
        P.per_thread = sum(a["size"] for a in ids)
        P.n_ids = P.per_thread // 64
        P.cross_mem = self._cross_thread_bytes(len(payload.data) - P.inline_size, P.per_thread)
        P.entry, P.heap_base = TEXT_BASE, HEAP_BASE
        walk = self.info.get("user_attributes", {}).get("intel_reqd_workgroup_walk_order") or self.env.get("work_group_walk_order_dimensions") or []
        P.walk[:] = (list(walk) if sorted(walk) == [0, 1, 2] else [0, 1, 2]) + [0]
        return P

    def _cross_thread_bytes(self, used, per_thread):
        """Size of the cross-thread data in memory, in front of the local ids. The prologue adds it: believe the code."""
        size = -(-max(used, 0) // 32) * 32
        for ins in self.ins[:8] if per_thread else []:
            m = re.match(r"\(W\)\s+add \(1\|M0\)\s+r(\d+)\.2<1>:ud\s+r\1\.2<0;1,0>:ud\s+0x([0-9A-F]+):ud", ins.text)
            if m:
                if int(m[2], 16) < size:
                    raise SimError("the prologue disagrees with the cross-thread size")
                return int(m[2], 16)
        return size


def _sizes(size):
    return [int(x) for x in size] if hasattr(size, "__len__") else [int(size)]
