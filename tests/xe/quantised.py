"""Quantised weights for the tests that run machine code: codes, scales and zeros as they are stored, and their values by definition."""
from __future__ import annotations

import numpy as np

from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, RowScale

COUNTS = [70, 0, 1, 15]      # rows: of the first height whole and in part, and of the second
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
KINDS = {
    "rows, bias": dict(bias=Dtype.bf16),
    "gathered": dict(gathered=True, slots=3),
    "gathered, halves": dict(gathered=True, activation=Activation(), slots=2),
    "gathered, interleaved, bias": dict(gathered=True, activation=OAI, slots=4, bias=Dtype.f32),
    "scattered": dict(scattered=True, row_scale=RowScale.outputs),
}
PITCH, ROWS = 16, 4        # a row's bytes and an expert's rows are multiples, as block messages ask


def code_values(codes: Codes) -> np.ndarray:
    """The number of every code."""
    numbers = np.arange(1 << codes.bits)
    if codes in (Codes.int4, Codes.int8):
        half = len(numbers) // 2
        return ((numbers + half) % len(numbers) - half).astype("f8")
    if codes is Codes.uint4:
        return numbers.astype("f8")
    if codes is Codes.e5m2:
        return (numbers.astype("u2") << 8).view("f2").astype("f8")
    if codes is Codes.e2m1:
        return _minifloat(numbers, 2, 1, bias=1)
    values = _minifloat(numbers, 4, 3, bias=7)
    values[[0x7F, 0xFF]] = np.nan
    return values


def _minifloat(bits: np.ndarray, exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    mantissa, exponent = bits % (1 << mantissa_bits), bits >> mantissa_bits & (1 << exponent_bits) - 1
    sizes = np.where(exponent > 0, (mantissa / (1 << mantissa_bits) + 1) * 2.0 ** (exponent - bias),
                     mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias))
    return np.where(bits >> (exponent_bits + mantissa_bits) & 1, -sizes, sizes)


def scale_values(bits: np.ndarray, kind: ScaleType) -> np.ndarray:
    if kind is ScaleType.e8m0:
        return np.where(bits == 255, np.nan, 2.0 ** (bits.astype("f8") - 127))
    if kind is ScaleType.e4m3:
        return code_values(Codes.e4m3)[bits]
    return (bits.astype("u4") << 16).view("f4").astype("f8") if kind is ScaleType.bf16 else bits.astype("f8")


def store_scales(values: np.ndarray, kind: ScaleType) -> np.ndarray:
    """Near these values, which are positive for e8m0 and e4m3."""
    if kind is ScaleType.e8m0:
        return np.clip(np.rint(np.log2(values)) + 127, 0, 254).astype("u1")
    if kind is ScaleType.e4m3:
        return np.abs(code_values(Codes.e4m3)[:127] - values[..., None]).argmin(-1).astype("u1")
    if kind is ScaleType.bf16:
        return (values.astype("f4").view("u4") >> 16).astype("u2")
    return values.astype("f4" if kind is ScaleType.f32 else "f2")


class QuantisedWeights:
    """Of every expert, random, about as large as dense ones: rows x columns as in memory.

    stored: bytes, junk behind each row and expert; values: float64 [experts, rows, columns], without
    the experts' scales, which are to be applied to sums.
    """

    def __init__(self, quantization: Quantization, experts: int, rows: int, columns: int, rng, size: float, padding: int):
        q, table = quantization, code_values(quantization.codes)
        self.codes = rng.integers(0, len(table), (experts, rows, columns)).astype("u1")
        self.codes[~np.isfinite(table[self.codes])] = 1
        numbers = table[self.codes]
        grid = experts, -(-rows // q.rows), -(-columns // q.columns)
        spread = size / np.sqrt((numbers ** 2).mean())
        self.global_scales = rng.uniform(0.5, 1.5, experts).astype("f4") if q.global_scales else None
        if q.scales is ScaleType.e4m3:      # as large as they can be
            self.global_scales *= spread / 16
            spread = 16
        self.scales = store_scales(spread * 2.0 ** rng.uniform(-1, 1, grid), q.scales)
        middle = 7.5 if q.codes is Codes.uint4 else 0.0
        self.zeros = store_scales(np.rint(middle + rng.uniform(-3, 3, grid)), q.scales) if q.zeros else None
        self.stored = self._stored(q, rng, padding)
        zeros = q.zero if self.zeros is None else self._of_weights(scale_values(self.zeros, q.scales), q)
        self.values = (numbers - zeros) * self._of_weights(scale_values(self.scales, q.scales), q)

    def _of_weights(self, grid: np.ndarray, q: Quantization) -> np.ndarray:
        """A group's number for each of its weights."""
        return grid.repeat(q.rows, 1)[:, :self.codes.shape[1]].repeat(q.columns, 2)[:, :, :self.codes.shape[2]]

    def _stored(self, q: Quantization, rng, padding: int) -> np.ndarray:
        experts, rows, columns = self.codes.shape
        row_bytes = -(-columns * q.codes.bits // 8)
        box = rng.integers(0, 256, (experts, _round_up(rows + padding, ROWS), _round_up(row_bytes + padding, PITCH))).astype("u1")
        box[:, :rows, :row_bytes] = self.codes if q.codes.bits == 8 else self.codes[..., 0::2] | self.codes[..., 1::2] << 4
        return box


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
