"""What a measured choice depends on. Calls with equal keys share it, whatever process measured."""
from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

from ..disk_cache import Facts
from ..jit.cache_key import environment_facts
from ..plan.gemm.config import TileConfig
from ..plan.outer.config import OuterConfig, OuterProblem
from ..plan.problem import GroupedGemmProblem
from ..runtime import DeviceFacts

Plain = None | bool | int | float | str
Problem = GroupedGemmProblem | OuterProblem
Config = TileConfig | OuterConfig

UNREAD = "unread"
_INTEGERS = {"cores", "num_experts", "rows_bucket", "skew_bucket"}
_MOST = 1 << 63     # no number of ours is as large


@dataclass(frozen=True)
class TuningKey:
    """shipped_sources ... cpu_isa: as kernels on disk depend on them. cores: work-groups of a launch.

    op: "grouped_gemm" or "grouped_outer"; problem: its fields, by name and sorted; a field of a field is "a.b".
    kind: the configurations' class, which the operands' alignment decides; schedule: theirs, "" where they have none.
    restriction: what else about the operands rules configurations out, "" if nothing.
    rows_bucket, skew_bucket: see the functions of these names.
    """
    shipped_sources: str
    moe_xe: str
    compiler: str
    backend: str
    device: str
    architecture: str
    driver: str
    cpu_isa: str
    cores: int
    op: str
    problem: tuple[tuple[str, Plain], ...]
    kind: str
    schedule: str
    restriction: str
    num_experts: int
    rows_bucket: int
    skew_bucket: int | str

    def facts(self) -> Facts:
        """The key as values that JSON gives back as they are."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"problem": dict(self.problem)}

    @classmethod
    def from_facts(cls, facts: Facts) -> TuningKey:
        """Raises ValueError for what is no key, naming the field."""
        names = [field.name for field in fields(cls)]
        if not isinstance(facts, dict) or facts.keys() != set(names):
            raise ValueError(f"a key must be an object with {', '.join(names)}, got {reprlib.repr(facts)}")
        for name, value in facts.items():
            expected = dict if name == "problem" else int if name in _INTEGERS else str
            unread = name == "skew_bucket" and value == UNREAD
            if not unread and (type(value) is not expected or not (value is facts["problem"] or _plain(value))):
                raise ValueError(f"{name} of a key must be of type {expected.__name__}, {_PLAIN}, got {reprlib.repr(value)}")
        for name, value in facts["problem"].items():
            if not _plain(name):
                raise ValueError(f"names of a key's problem must be text {_PLAIN}, got {reprlib.repr(name)}")
            if not _plain(value):
                raise ValueError(f"{name} of a key's problem must be a number, text or null, {_PLAIN}, got {reprlib.repr(value)}")
        return cls(**facts | {"problem": tuple(sorted(facts["problem"].items()))})


_PLAIN = "without what cannot be printed, finite and less than 2^63"


def _plain(value) -> bool:
    """Whether a file's value can be in a key, and on a terminal."""
    if isinstance(value, str):
        return value.isprintable()
    return value is None or (type(value) in (bool, int, float) and abs(value) < _MOST)


def rows_bucket(total_rows: int) -> int:
    """The power of two that is not less."""
    return 1 << max(total_rows - 1, 0).bit_length()


def skew_bucket(tokens_per_expert: Sequence[int]) -> int:
    """log2 of the fullest expert's rows / the mean of all experts, rounded: 0 for even loads, 5 if one of 32 has all."""
    total = sum(tokens_per_expert)
    return round(math.log2(max(tokens_per_expert) * len(tokens_per_expert) / total)) if total else 0


def tuning_key(facts: DeviceFacts, op: str, problem: Problem, num_experts: int, total_rows: int,
               skew: int | str, default: Config, restriction: str = "") -> TuningKey:
    """The key of one call on this device.

    op: "grouped_gemm" or "grouped_outer". skew: a `skew_bucket`, or UNREAD where each expert's rows stay on the device.
    default: the configuration that the call would have untuned. restriction: see TuningKey; a word for calls that not
    every configuration measured for others of its class can serve.
    """
    schedule = default.schedule.value if isinstance(default, TileConfig) else ""
    return _tuning_key(facts, op, problem, num_experts, rows_bucket(total_rows), skew, type(default).__name__, schedule,
                       restriction)


@functools.lru_cache(maxsize=4096)
def _tuning_key(facts: DeviceFacts, op: str, problem: Problem, num_experts: int, bucket: int, skew: int | str, kind: str,
                schedule: str, restriction: str) -> TuningKey:
    return TuningKey(**environment_facts(facts), cores=facts.xe_cores, op=op,
                     problem=tuple(sorted(_flat(problem).items())), kind=kind, schedule=schedule,
                     restriction=restriction, num_experts=num_experts, rows_bucket=bucket, skew_bucket=skew)


def _flat(values) -> dict[str, Plain]:
    """The fields of a dataclass, those of dataclasses within it under "field.field"."""
    found = {}
    for field in fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": inner for name, inner in _flat(value).items()}
        else:
            found[field.name] = value.value if isinstance(value, Enum) else value
    return found
