"""What a kernel's machine code consists of: a static summary of its disassembly, for any Xe device."""
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Sequence

from .dump import Dump

BRANCHES = {"jmpi", "goto", "goto.b", "while", "brc", "brd"}
OTHER_BRANCHES = {"join", "call", "calla", "ret", "if", "else", "endif", "break", "cont"}
SYSTOLIC_DEPTH, LANES = 8, 16
TYPE_BITS = {"bf": 16, "hf": 16, "tf32": 32, "b": 8, "ub": 8, "bf8": 8, "hf8": 8, "s4": 4, "u4": 4, "e2m1": 4}
CACHE_HINTS = re.compile(r"(\.(uc|ca|cc|wb|wt|st|ri|cs|df)){2,3}")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a listing.

    address: byte offset of the instruction, from `base` of parse. kind: "dpas", "send", "sync", "branch", "math", "nop" or "alu".
    message, message_class: of a send, as the disassembler decodes it ("load_block2d.ugm.d16.a64", "load_block2d").
    target: address of the label that a branch names first, else -1. macs: multiply-adds of a dpas.
    """
    address: int
    opcode: str
    text: str
    kind: str
    message: str = ""
    message_class: str = ""
    target: int = -1
    macs: int = 0
    end_of_thread: bool = False

    @property
    def float_mad(self) -> bool:
        return self.opcode == "mad" and re.search(r":(f|hf|bf|df)\b", self.text) is not None


@dataclass(frozen=True)
class Counts:
    """Instructions by class; other: neither dpas, nor message (send), nor sync. mad: floating-point mads, part of other."""
    instructions: int
    dpas: int
    mad: int
    messages: int
    sync: int
    other: int
    macs: int
    message_kinds: dict[str, int]
    other_kinds: dict[str, int]

    @property
    def other_per_dpas(self) -> float | None:
        """(all instructions but dpas) / dpas; None without dpas."""
        return (self.instructions - self.dpas) / self.dpas if self.dpas else None

    @property
    def other_per_mad(self) -> float | None:
        """(all instructions but float mad) / float mad; None without mad."""
        return (self.instructions - self.mad) / self.mad if self.mad else None


@dataclass(frozen=True)
class Loop(Counts):
    """An innermost loop that multiplies; start, end: byte offsets of its first instruction and of its branch back.

    around: instructions of the loop around it, or else of the kernel, without its own.
    """
    start: int
    end: int
    around: int


@dataclass(frozen=True)
class Summary(Counts):
    """A kernel. Sizes in bytes: spill and private memory per hardware thread, slm per work-group; grf: registers per thread.

    loops: each innermost loop that contains dpas, or, in a kernel without dpas, a float mad.
    undefined: functions that the kernel calls and nobody defines. stack_calls: there are real calls, whose frames count as spills.
    """
    kernel: str
    grf: int
    simd: int
    spill_bytes: int
    private_bytes: int
    slm_bytes: int
    barriers: int
    stack_calls: bool
    undefined: tuple[str, ...]
    loops: tuple[Loop, ...] = field(repr=False)

    @property
    def dpas_loops(self) -> int:
        """How many innermost loops contain dpas."""
        return sum(loop.dpas > 0 for loop in self.loops)


def summarize(dump: Dump, kernel: str) -> Summary:
    """Static summary of one kernel (named as in the source). Functions that it calls are not counted. Raises KeyError."""
    info = dump.kernel(kernel)
    environment, section = info["execution_env"], f".text.{info['name']}"
    body = executable(parse(dump.listing(section)))
    unknown = {r.symbol.name for r in dump.relocations(section) if r.symbol.section == "UNDEF"}
    undefined = tuple(sorted(name for name in unknown if not name.startswith("__INTEL_")))       # those the driver patches
    return Summary(**_count(body), kernel=kernel, grf=environment["grf_count"], simd=environment["simd_size"],
                   spill_bytes=environment.get("spill_size", 0), private_bytes=environment.get("private_size", 0),
                   slm_bytes=environment.get("slm_size", 0), barriers=environment.get("barrier_count", 0),
                   stack_calls=bool(environment.get("has_stack_calls")), undefined=undefined, loops=multiplying_loops(body))


def parse(text: str, base: int = 0) -> list[Instruction]:
    """The instructions of a section's listing; base: address of its first byte. Raises ValueError for a line that is no instruction."""
    out, address = [], base
    for line in filter(None, map(str.strip, text.splitlines())):
        if label := re.fullmatch(r"L(\d+):", line):
            address = base + int(label[1])       # a label's name is its offset
            continue
        out.append(_instruction(line, address, base))
        address += 8 if "Compacted" in line else 16
    return out


def executable(instructions: Sequence[Instruction]) -> list[Instruction]:
    """Without what follows the end of the thread: marks of the compiler and padding."""
    last = max((i for i, ins in enumerate(instructions) if ins.end_of_thread), default=len(instructions) - 1)
    return list(instructions[:last + 1])


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """(first, last) index of every loop, one for each target of backward branches; the shortest first."""
    index = {ins.address: i for i, ins in enumerate(instructions)}
    last: dict[int, int] = {}
    for i, ins in enumerate(instructions):
        if ins.opcode in BRANCHES and 0 <= ins.target <= ins.address and ins.target in index:
            last[index[ins.target]] = i
    return sorted(last.items(), key=lambda loop: loop[1] - loop[0])


def multiplying_loops(body: Sequence[Instruction]) -> tuple[Loop, ...]:
    """Each innermost loop that contains dpas, or, where nothing is dpas, a float mad; in the order of their addresses."""
    systolic = any(ins.kind == "dpas" for ins in body)
    found: list[tuple[int, int]] = []
    every = loops(body)
    for first, last in every:
        multiplies = any(ins.kind == "dpas" if systolic else ins.float_mad for ins in body[first:last + 1])
        if multiplies and not any(first <= a and b <= last for a, b in found):
            found.append((first, last))

    def around(a: int, b: int) -> int:
        outer = next(((c, d) for c, d in every if c <= a and b <= d and (c, d) != (a, b)), (0, len(body) - 1))
        return outer[1] - outer[0] - (b - a)

    return tuple(Loop(**_count(body[a:b + 1]), start=body[a].address, end=body[b].address, around=around(a, b)) for a, b in sorted(found))


def _count(body: Sequence[Instruction]) -> dict:
    kinds = Counter(ins.kind for ins in body)
    dpas, messages, sync = kinds["dpas"], kinds["send"], kinds["sync"]
    return dict(instructions=len(body), dpas=dpas, mad=sum(ins.float_mad for ins in body), messages=messages, sync=sync,
                other=len(body) - dpas - messages - sync, macs=sum(ins.macs for ins in body),
                message_kinds=dict(Counter(ins.message for ins in body if ins.kind == "send").most_common()),
                other_kinds=dict(Counter(ins.opcode for ins in body if ins.kind not in ("dpas", "send", "sync")).most_common()))


LINE = re.compile(r"(?:\(.*?\)\s*)?([a-z][\w.]*)\s*(.*)")       # predicate, opcode, the rest


def _instruction(line: str, address: int, base: int) -> Instruction:
    code, _, comment = line.partition("//")
    code, _, controls = code.partition("{")
    match = LINE.fullmatch(code.strip())
    if not match:
        raise ValueError(f"not an instruction: {line}")
    opcode, operands = match.groups()
    if opcode.startswith("send"):
        ends = "EOT" in controls
        message_class, message = ("eot", "eot") if ends else _message(comment, operands)
        return Instruction(address, opcode, line, "send", message, message_class, end_of_thread=ends)
    if opcode.startswith(("dpas", "bdpas")):
        return Instruction(address, opcode, line, "dpas", macs=_macs(opcode, operands))
    if opcode in BRANCHES or opcode in OTHER_BRANCHES:
        label = re.search(r"\bL(\d+)\b", operands)
        return Instruction(address, opcode, line, "branch", target=base + int(label[1]) if label else -1)
    kind = next((k for k in ("sync", "math") if opcode.startswith(k)), "nop" if opcode in ("nop", "illegal") else "alu")
    return Instruction(address, opcode, line, kind)


def _macs(opcode: str, operands: str) -> int:
    """Multiply-adds of "dpas.8x<rows>": rows x lanes x depth x elements in a dword of operand B."""
    rows = int(re.search(r"x(\d+)", opcode)[1])
    types = re.findall(r":(\w+)", operands)
    return rows * LANES * SYSTOLIC_DEPTH * 32 // TYPE_BITS[types[2]]


def _message(comment: str, operands: str) -> tuple[str, str]:
    """(class, message) of a send, from the decoded form behind its comment sign; cache hints and addresses are left out."""
    decoded = comment.rpartition(";")[2].strip()
    message = CACHE_HINTS.sub("", re.sub(r"((\.flat)?\[A.*| \[.*)\]$", "", decoded))
    slm = ".slm" in message
    to_null = operands.split()[1].startswith("null")
    if "barrier" in message:
        return "barrier", "barrier_signal"
    if message.startswith("fence"):
        return "fence", message
    if "bti[255]" in message:
        return "payload", message
    if ".ss[" in message:
        return "scratch_store" if message.startswith("store") else "scratch_load", message
    if message.startswith("load") and to_null:
        return "prefetch_block2d" if message.startswith("load_block2d") else "prefetch", "prefetch" + message[4:]
    if message.startswith(("load_block2d", "store_block2d")):
        return message.partition(".")[0], message
    if message.startswith("atomic"):
        return "atomic_slm" if slm else "atomic", message
    for name in ("load", "store"):
        if message.startswith(name):
            return f"slm_{name}" if slm else name, message
    return "other", message or operands
