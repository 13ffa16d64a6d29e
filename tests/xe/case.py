"""A grouped GEMM in simulated memory, with the result it should give; shared by the tests that run machine code.

Memory outside the operands is unmapped in the simulator; padding between rows and experts holds NaN, and so does the output.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.plan.config import SubGroupConfig
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowsFormat, WeightLayout

missing = spirv.missing() or ocloc.missing()

ENK, EKN = WeightLayout.enk, WeightLayout.ekn
REPORT: list[str] = []      # dynamic instruction counts, for conftest.py's summary
RAGGED = [300, 0, 1, 70, 15, 0, 130, 33]


@cache
def kernel_of(problem: GroupedGemmProblem, config: SubGroupConfig):
    from xesim import Kernel
    return Kernel(kernels.build(problem, config, "bmg"), "grouped_gemm")


def encode(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """fp32 -> the bits that are stored (round to nearest even)."""
    if dtype is Dtype.bf16:
        bits = values.astype("f4").view("u4").astype("u8")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
    return values.astype("f2").view("u2") if dtype is Dtype.f16 else values.astype("f4").view("u4")


def decode(bits: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype is Dtype.bf16:
        return (bits.astype("u4") << 16).view("f4")
    return bits.view("f2").astype("f4") if dtype is Dtype.f16 else bits.view("f4")


def padded(values: np.ndarray, dtype: Dtype, *padding: int) -> np.ndarray:
    """The stored array with so many more entries of NaN behind each dimension."""
    bits = encode(values, dtype)
    box = encode(np.full([s + p for s, p in zip(bits.shape, padding)], np.nan, "f4"), dtype)
    box[tuple(slice(s) for s in bits.shape)] = bits
    return box


@dataclass
class Case:
    """Operands in simulated memory and the result that they should give."""
    problem: GroupedGemmProblem
    counts: list[int]
    seed: int = 0
    padding: int = 8             # elements behind every row of a, w and d
    total_rows: int | None = None  # if it is not the sum of the counts

    def __post_init__(self):
        p, rng = self.problem, np.random.default_rng(self.seed)
        e, m = len(self.counts), sum(self.counts) if self.total_rows is None else self.total_rows
        self.rows_of_d = m
        a_rows = m + 13 if p.gathered else m
        a, w = rng.standard_normal((a_rows, p.k), "f4"), rng.standard_normal((e, p.n, p.k), "f4") / np.sqrt(p.k)
        bias = rng.standard_normal((e, p.n), "f4")
        self.indices = rng.integers(0, a_rows, m).astype("i4") if p.gathered else None
        self.a = padded(a, p.input, 0, self.padding)
        stored_w = w if p.weights is ENK else w.transpose(0, 2, 1)
        self.w = padded(np.ascontiguousarray(stored_w), p.input, 0, 16, self.padding)
        self.bias = padded(bias, p.bias, 0, 3) if p.bias else None
        self.d = padded(np.full((m, p.n), np.nan, "f4"), p.output, 0, self.padding)
        self.poison = self.d.copy()
        rows = self.counts if p.rows_format is RowsFormat.counts else np.cumsum(self.counts)
        self.rows = np.array(rows, f"i{p.rows_bits // 8}")
        a, w = (self._as_read(x) for x in (a, w))
        if p.gathered:
            a = a[self.indices]
        ends = np.cumsum(self.counts)
        self.want = np.zeros((m, p.n), "f4")
        for i in range(e):
            mine = slice(ends[i] - self.counts[i], ends[i])
            self.want[mine] = a[mine] @ w[i].T + (decode(encode(bias[i], p.bias), p.bias) if p.bias else 0)

    def _as_read(self, values: np.ndarray) -> np.ndarray:
        """What is multiplied: tf32 is a truncated fp32."""
        if self.problem.tf32:
            return (values.astype("f4").view("u4") & np.uint32(0xFFFFE000)).view("f4")
        return decode(encode(values, self.problem.input), self.problem.input)

    def launch(self, config: SubGroupConfig, groups: int, seed: int = 0):
        counter = np.zeros(1, "i4")
        i8 = np.int64
        args = [self.a, self.w, None, None, self.bias, self.d, self.rows, self.indices, None, counter, None, i8(self.rows_of_d),
                i8(len(self.a)), i8(len(self.d)), i8(self.a.shape[1]), i8(self.w.shape[2]), i8(self.w[0].size), i8(0), i8(0),
                i8(self.bias.shape[1] if self.bias is not None else 0), i8(self.d.shape[1]), np.int32(len(self.counts))]
        size = config.work_group_size
        stats = kernel_of(self.problem, config).launch(groups * size, size, args, seed=seed)
        assert not stats.warnings, stats.warnings
        return stats

    def check(self):
        n, p = self.problem.n, self.problem
        assert (self.d[:, n:] == self.poison[:, n:]).all(), "written beyond N"
        got, want = decode(self.d[:, :n].copy(), p.output).astype("f8"), self.want.astype("f8")
        rms = np.sqrt((want ** 2).mean())
        tolerance = {Dtype.bf16: 3e-2, Dtype.f16: 4e-3, Dtype.f32: 1e-5}[p.output]
        assert np.abs(got - want).max() / rms < tolerance
        assert 1 - 2 * (got * want).sum() / ((got * got).sum() + (want * want).sum()) < 1e-5


def run(problem: GroupedGemmProblem, config: SubGroupConfig, counts=RAGGED, groups=(1, 7, 40)):
    for seed, work_groups in enumerate(groups):
        case = Case(problem, list(counts), seed, padding=8 if seed else 0)
        stats = case.launch(config, work_groups, seed)
        case.check()
    REPORT.append(f"{problem.input.value} {problem.weights.value}{' gathered' if problem.gathered else ''}, N={problem.n} K={problem.k}, "
                  f"heights {config.heights}, width {config.tile_width}: {stats.total} instructions, {stats.dpas} dpas, "
                  f"{stats.counts.send} messages")
