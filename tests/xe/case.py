"""A grouped GEMM in simulated memory, with the result it should give; shared by the tests that run machine code.

Memory outside the operands is unmapped in the simulator; padding between rows and experts holds NaN, and so does the output.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.ops.block.activation import apply_activation
from moe_xe.plan.gemm.config import Schedule, SubGroupConfig, XeConfig
from moe_xe.plan.launch import QUEUE_WORDS, RECORD_BYTES, num_entries
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowScale, RowsFormat, WeightLayout

from .quantised import QuantisedWeights

missing = spirv.missing() or ocloc.missing()

ENK, EKN = WeightLayout.enk, WeightLayout.ekn
REPORT: list[str] = []      # dynamic instruction counts, for conftest.py's summary

# A sub-group's rows x columns: for heights from 256 down, and, WIDE, for heights from 64 down of tiles of 512 columns
HEIGHTS = (256, 128, 64, 32, 16)
SHAPES = {ENK: ((32, 64), (32, 32), (16, 32), (16, 16), (16, 8)), EKN: ((32, 64), (32, 32), (16, 32), (16, 16), (8, 16))}
SHAPES_PAIRS = {ENK: ((32, 64), (32, 32), (16, 32), (16, 16), (16, 16)), EKN: ((32, 64), (32, 32), (16, 32), (8, 32), (8, 32))}
WIDE = {ENK: ((16, 64), (32, 16), (16, 64)), EKN: ((16, 64), (32, 16), (8, 64))}
WIDE_PAIRS = {ENK: ((16, 64), (32, 16), (16, 64)), EKN: ((16, 64), (16, 32), (8, 64))}
RAGGED = [300, 0, 1, 70, 15, 0, 130, 33]


@cache
def kernel_of(problem: GroupedGemmProblem, config: SubGroupConfig):
    from xesim import Kernel
    return Kernel(kernels.build(problem, config, "bmg"), "grouped_gemm")


def config_of(problem: GroupedGemmProblem, width: int = 256, schedule: Schedule = Schedule.dynamic, heights: int = 5) -> XeConfig:
    """The `heights` shortest tiles of SHAPES, or of WIDE if they are 512 columns wide; experts' rows span raster groups."""
    tables = (WIDE, WIDE_PAIRS) if width == 512 else (SHAPES, SHAPES_PAIRS)
    rows, columns = zip(*tables[problem.pairs][problem.weights][-heights:])
    return XeConfig(HEIGHTS[-len(rows):], width, raster_group=2, min_fill_eighths=7, schedule=schedule, sub_group_rows=rows,
                    sub_group_columns=columns, prefetch_distance=3)


def default_config(problem: GroupedGemmProblem, n: int, k: int, total_rows: int, num_experts: int) -> XeConfig:
    """What a model's GEMM of this kind, N x K, takes by default."""
    return kernels.default_config(replace(problem, n=n, k=k), total_rows, num_experts)


def encode(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """fp32 -> the bits that are stored (round to nearest even); of int8 the codes."""
    if dtype is Dtype.i8:
        return np.nan_to_num(values, nan=77).astype("i1")
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
    """Operands in simulated memory and the result that they should give.

    counts: rows of the shared experts' groups first, then of the routed ones; of several ranks one after the other. Sorted rows beyond
    their sum have index -1. Of the batched layout total_rows are shared out to the groups.
    """
    problem: GroupedGemmProblem
    counts: list[int]
    seed: int = 0
    padding: int = 8             # elements behind every row of a, w and d
    total_rows: int | None = None  # if it is not the sum of the counts

    def __post_init__(self):
        p, rng = self.problem, np.random.default_rng(self.seed)
        self.groups, used = len(self.counts) // p.ranks, sum(self.counts)
        self.sorted_rows = used if self.total_rows is None else self.total_rows
        a_rows = -(-self.sorted_rows // p.slots) + 13 if p.gathered else self.sorted_rows
        d_rows = self.sorted_rows + 5 if p.scattered else self.sorted_rows
        int8 = p.input is Dtype.i8
        a = rng.integers(-127, 128, (a_rows, p.k)).astype("f4") if int8 else rng.standard_normal((a_rows, p.k), "f4")
        self.a_scales = rng.uniform(0.005, 0.02, a_rows).astype("f4") if int8 else None
        self.quantised = self._quantised(rng) if p.quantization else None
        w = self.quantised_values() if p.quantization else rng.standard_normal((self.groups, p.n, p.k), "f4") / np.sqrt(p.k)
        bias = rng.standard_normal((self.groups, p.n), "f4")
        bias[:p.shared] = 0
        scales = rng.uniform(-1.5, 1.5, self.sorted_rows).astype("f4")
        self.indices = self._row_indices(rng, a_rows, d_rows) if p.gathered or p.scattered else None
        self.row_scales = scales if p.row_scale is not RowScale.none else None
        self.a = padded(a, p.input, 0, 2 * self.padding if int8 else self.padding)
        self.w = self.quantised.stored if p.quantization else self._stored(w[p.shared:])
        self.shared_w, self.shared_up, self.shared_expert_stride = self._stored_shared(w[:p.shared])
        self.bias = padded(bias[p.shared:], p.bias, 0, 3) if p.bias else None
        self.d = padded(np.full((d_rows, p.out_n), np.nan, "f4"), p.output, 0, self.padding)
        self.poison = self.d.copy()
        rows = np.cumsum(self.counts) if p.rows_format is RowsFormat.ends else np.array(self.counts)
        self.rows = np.pad(rows.reshape(p.ranks, self.groups), ((0, 0), (0, 3 * (p.ranks > 1))), constant_values=99).astype(f"i{p.rows_bits // 8}")

        if int8:
            a, w = a * self.a_scales.astype("f8")[:, None], w.astype("f8")
        else:
            a, w = (self._as_read(x) for x in (a, w))
        if self.quantised and p.quantization.global_scales:
            w = w * self.quantised.global_scales[:, None, None]
        bias = decode(encode(bias, p.bias), p.bias) if p.bias else np.zeros_like(bias)
        source = self.indices.clip(0) // p.slots if p.gathered else np.arange(self.sorted_rows)
        target = self.indices if p.scattered else np.arange(self.sorted_rows)
        self.want = np.full((d_rows, p.out_n), np.nan, "f4")     # NaN: is not written
        group_of_row = np.repeat(np.tile(np.arange(self.groups), p.ranks), self.counts)
        if p.rows_format is RowsFormat.batched:
            group_of_row = np.array([group if row < count else -1 for group, count in enumerate(self.counts)
                                     for row in range(self.sorted_rows // self.groups)])
        for group in range(self.groups):
            mine = np.flatnonzero(group_of_row == group)
            mine = mine[target[mine] >= 0]
            self.want[target[mine]] = self._outputs(a[source[mine]] @ w[group].T, bias[group], scales[mine, None])

    def _quantised(self, rng) -> QuantisedWeights:
        p = self.problem
        shape = (p.n, p.k) if p.weights is ENK else (p.k, p.n)
        return QuantisedWeights(p.quantization, self.groups, *shape, rng, 1 / np.sqrt(p.k), self.padding)

    def quantised_values(self) -> np.ndarray:
        """[experts, N, K], as dense ones; the activations' rounding is to come."""
        values = self.quantised.values
        return (values if self.problem.weights is ENK else values.transpose(0, 2, 1)).astype("f4")

    def _row_indices(self, rng, a_rows: int, d_rows: int) -> np.ndarray:
        """Pairs: of random tokens, or distinct ones, a few of which are left out."""
        if self.problem.scattered:
            indices = rng.permutation(d_rows)[:self.sorted_rows]
            indices[rng.random(self.sorted_rows) < 0.05] = -1
        else:
            indices = rng.integers(0, a_rows * self.problem.slots, self.sorted_rows)
        indices[sum(self.counts):] = -1
        return indices.astype("i4")

    def _stored(self, w: np.ndarray) -> np.ndarray | None:
        stored = w if self.problem.weights is ENK else w.transpose(0, 2, 1)
        return padded(np.ascontiguousarray(stored), self.problem.input, 0, 16, self.padding) if len(w) else None

    def _stored_shared(self, w: np.ndarray):
        """Gates' and up values' weights apart, groups below each other; or side by side, as a down projection is cut."""
        if not len(w):
            return None, None, 0
        if self.problem.pairs:
            first, up = (self._stored(part) for part in np.split(w, 2, axis=1))
            return first, up, first[0].size
        side_by_side = self._stored(np.concatenate(list(w), axis=1)[None])
        return side_by_side, None, self.problem.k if self.problem.weights is ENK else self.problem.k * side_by_side.shape[2]

    def _outputs(self, sums: np.ndarray, bias: np.ndarray, scales: np.ndarray) -> np.ndarray:
        p = self.problem
        sums = (sums * scales if p.row_scale is RowScale.sums else sums) + bias
        outputs = apply_activation(torch.from_numpy(sums), p.activation).numpy() if p.activation else sums
        return outputs * scales if p.row_scale is RowScale.outputs else outputs

    def _as_read(self, values: np.ndarray) -> np.ndarray:
        """What is multiplied: tf32 is a truncated fp32."""
        if self.problem.tf32:
            return (values.astype("f4").view("u4") & np.uint32(0xFFFFE000)).view("f4")
        return decode(encode(values, self.problem.input), self.problem.input)

    def launch(self, config: SubGroupConfig, groups: int, seed: int = 0):
        row_stride = lambda x: np.int64(0 if x is None else x.shape[-1])
        codes, p = self.quantised, self.problem
        scales = [None] * 3 if codes is None else [codes.scales, codes.zeros, codes.global_scales]
        per_byte = 1 if codes is None else 8 // p.quantization.codes.bits
        args = [self.a, self.a_scales, self.w, self.shared_w, self.shared_up, *scales, self.bias, self.d, self.rows, self.indices, self.row_scales,
                np.zeros(QUEUE_WORDS, "i4"), self.scratch(config), np.int64(self.sorted_rows), np.int64(len(self.a)), np.int64(len(self.d)), row_stride(self.a),
                per_byte * row_stride(self.w), np.int64(0 if self.w is None else per_byte * self.w[0].size), row_stride(self.shared_w),
                np.int64(self.shared_expert_stride), row_stride(self.bias), row_stride(self.d), row_stride(self.rows), np.int32(self.groups)]
        size = config.work_group_size
        stats = kernel_of(self.problem, config).launch(groups * size, size, args, seed=seed)
        assert not stats.warnings, stats.warnings
        return stats

    def scratch(self, config: SubGroupConfig) -> np.ndarray:
        """The list of tiles, with junk; no byte more than a launch has."""
        tiles = config.most_records(self.problem, self.sorted_rows, self.groups)
        return np.full((num_entries(self.groups, self.problem.ranks) * RECORD_BYTES + tiles * config.entry_bytes) // 4, -7, "i4")

    def check(self):
        p, written = self.problem, ~np.isnan(self.want).all(1)
        assert (self.d[:, p.out_n:] == self.poison[:, p.out_n:]).all(), "written beyond the columns"
        assert (self.d[~written] == self.poison[~written]).all(), "written to a row that nothing belongs to"
        got, want = decode(self.d[written, :p.out_n].copy(), p.output).astype("f8"), self.want[written].astype("f8")
        rms = np.sqrt((want ** 2).mean())
        tolerance = {Dtype.bf16: 4e-3, Dtype.f16: 6e-4, Dtype.f32: 1e-5}[p.output]
        assert (np.abs(got - want) / (np.abs(want) + rms)).max() < tolerance
        assert 1 - 2 * (got * want).sum() / ((got * got).sum() + (want * want).sum()) < 1e-5


def name(problem: GroupedGemmProblem) -> str:
    """Types, layout and what is fused; sizes."""
    p, act = problem, problem.activation
    fused = ["gathered"] * p.gathered + ["scattered"] * p.scattered + [f"{p.shared} shared"] * bool(p.shared)
    if act:
        fused.append(act.kind.value + (" interleaved" if act.interleaved else "" if act.gated else " no gate"))
    codes = [p.quantization.codes.value] if p.quantization else []
    return " ".join([p.input.value, p.output.value, *codes, p.weights.value, *fused, f"{p.n}x{p.k}"])


def run(problem: GroupedGemmProblem, config: SubGroupConfig, counts=RAGGED, groups=(1, 7, 40), unused: int = 0):
    """One launch for each number of work-groups, the first without padding. unused: sorted rows beyond the counts."""
    for seed, work_groups in enumerate(groups):
        case = Case(problem, list(counts), seed, padding=8 if seed else 0, total_rows=sum(counts) + unused)
        stats = case.launch(config, work_groups, seed)
        case.check()
    REPORT.append(f"{name(problem)}, heights {config.heights}, width {config.tile_width}: {stats.total} instructions, "
                  f"{stats.dpas} dpas, {stats.counts.send} messages")
