"""Formats of quantised weights as data: how codes become numbers, and what scales they come with.

A weight is ``(number(code) - zero) * scale``, times its expert's global scale, if there is one. Codes and scales lie in the checkpoint's order: codes
along the contiguous dimension, two 4-bit ones in a byte, the low half first.
"""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["CHECKPOINTS", "FORMATS", "Checkpoint", "Codes", "Quantization", "ScaleType", "WeightFormat"]

# e2m1 (OCP Microscaling Formats 1.0): sign, two bits of exponent, one of mantissa
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Codes(str, Enum):
    """What the bits of one code say. int4 and int8: two's complement. uint4: unsigned. e4m3: OCP's "fn", 0x7F and 0xFF are NaN, no infinity.
    e5m2: as IEEE's."""
    int4 = "int4"
    uint4 = "uint4"
    e2m1 = "e2m1"
    int8 = "int8"
    e4m3 = "e4m3"
    e5m2 = "e5m2"

    @property
    def bits(self) -> int:
        return 4 if self in _TABLES else 8

    @property
    def is_integer(self) -> bool:
        return self in (Codes.int4, Codes.uint4, Codes.int8)

    @property
    def table(self) -> tuple[float, ...]:
        """The number of each of the sixteen 4-bit codes."""
        return _TABLES[self]


_TABLES = {
    Codes.int4: (*map(float, range(8)), *map(float, range(-8, 0))),
    Codes.uint4: tuple(map(float, range(16))),
    Codes.e2m1: (*_E2M1, *(-value for value in _E2M1)),
}


class ScaleType(str, Enum):
    """How scales are stored. e8m0: a byte e is 2^(e - 127), 255 is NaN (OCP Microscaling Formats 1.0)."""
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    e8m0 = "e8m0"
    e4m3 = "e4m3"

    @property
    def size(self) -> int:
        """Bytes of one."""
        return {ScaleType.f32: 4, ScaleType.f16: 2, ScaleType.bf16: 2}.get(self, 1)


FLOATS = (ScaleType.f32, ScaleType.f16, ScaleType.bf16)


@dataclass(frozen=True)
class WeightFormat:
    """One format. scales: the types that its scales can have, the usual one first. group: (gn, gk), where the format says so. zero: of codes
    without zeros of their own. can_have_zeros: whether each group can have a zero.
    """
    codes: Codes
    scales: tuple[ScaleType, ...]
    group: tuple[int, int] | None = None
    zero: float = 0.0
    can_have_zeros: bool = False


FORMATS = {
    "mxfp4": WeightFormat(Codes.e2m1, (ScaleType.e8m0,), (1, 32)),
    "nvfp4": WeightFormat(Codes.e2m1, (ScaleType.e4m3,), (1, 16)),
    "int4": WeightFormat(Codes.int4, FLOATS, can_have_zeros=True),
    "uint4": WeightFormat(Codes.uint4, FLOATS, zero=8.0, can_have_zeros=True),
    "int8": WeightFormat(Codes.int8, FLOATS, can_have_zeros=True),
    "fp8_e4m3": WeightFormat(Codes.e4m3, (*FLOATS, ScaleType.e8m0)),
    "fp8_e5m2": WeightFormat(Codes.e5m2, (*FLOATS, ScaleType.e8m0)),
    "mxfp8": WeightFormat(Codes.e4m3, (ScaleType.e8m0,), (1, 32)),
}


@dataclass(frozen=True)
class Checkpoint:
    """A format as published checkpoints have it. group: (gn, gk)."""
    format: str
    group: tuple[int, int]
    scales: ScaleType

    @property
    def quantization(self) -> Quantization:
        """Of [E, N, K] weights."""
        scheme = FORMATS[self.format]
        return Quantization(scheme.codes, self.scales, *self.group, zero=scheme.zero)

    @property
    def weight_bytes(self) -> float:
        """Of one weight, with its share of a scale."""
        return self.quantization.weight_bytes


# by the names of commands' --weights: gpt-oss; GPTQ, AWQ and AutoRound; DeepSeek-V3 and Qwen3's FP8; GPTQ's 8 bits
CHECKPOINTS = {
    "mxfp4": Checkpoint("mxfp4", (1, 32), ScaleType.e8m0),
    "int4": Checkpoint("uint4", (1, 128), ScaleType.f16),
    "fp8": Checkpoint("fp8_e4m3", (128, 128), ScaleType.f32),
    "int8": Checkpoint("int8", (1, 128), ScaleType.f16),
}


@dataclass(frozen=True)
class Quantization:
    """What a kernel is compiled for, of the codes and scales of its weights.

    rows, columns: of one group, in the weights' own order in memory: columns are along the contiguous dimension. zero: of all codes, if there
    are no zeros. zeros: there is one for each group, in the scales' type. global_scales: a float32 for each expert.
    finite: no code is NaN or infinite.
    """
    codes: Codes
    scales: ScaleType
    rows: int
    columns: int
    zero: float = 0.0
    zeros: bool = False
    global_scales: bool = False
    finite: bool = True

    @property
    def weight_bytes(self) -> float:
        """Of one weight in memory, with its share of its group's scale and zero."""
        return self.codes.bits / 8 + self.scales.size * (1 + self.zeros) / (self.rows * self.columns)
