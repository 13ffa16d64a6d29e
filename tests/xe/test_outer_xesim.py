"""The weights' gradient as BMG machine code, executed by xesim; memory around the operands is unmapped there."""
from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.jit.outer_source import KERNEL_NAME, generate
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.plan.launch import QUEUE_WORDS, RECORD_BYTES, num_entries
from moe_xe.plan.outer.config import Gathered, OuterProblem, OuterXeConfig
from moe_xe.plan.outer.heuristics import xe_outer_config
from moe_xe.plan.problem import Dtype, RowsFormat

from .case import REPORT, decode, encode, missing, padded

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
NONE, LEFT, RIGHT = Gathered
RAGGED = [70, 0, 1, 33, 64, 2, 31, 95]
UNUSED = 9          # sorted rows that no expert has
TOLERANCE = {BF16: 4e-3, F16: 6e-4, F32: 1e-5}


@cache
def kernel_of(problem: OuterProblem, config: OuterXeConfig):
    from xesim import Kernel
    root = sources_dir()
    image = spirv.compile_to_spirv(generate(problem, config), [f"-I{root / 'include'}", f"-I{root}"])
    return Kernel(ocloc.build(image, "bmg", kernels.LARGE_GRF), KERNEL_NAME)


def aligned(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """The stored array with NaN behind its rows, which are a multiple of 64 bytes apart, as block messages ask for."""
    gap = 64 // dtype.size
    return padded(values, dtype, *[0] * (values.ndim - 1), gap + -values.shape[-1] % gap)


class Case:
    """Operands in simulated memory and the result that they should give; d has a part for each split. Counts of several ranks come
    one after the other."""

    def __init__(self, problem: OuterProblem, counts: list[int], splits: int = 1, rows: list[int] | None = None, seed: int = 0):
        """rows: the table of counts or ends that the kernel sees, if it is not that of counts."""
        p, rng = problem, np.random.default_rng(seed)
        experts, room = len(counts) // p.ranks, max(counts) + 2
        batched = p.rows_format is RowsFormat.batched
        self.problem, self.total_rows = p, experts * room if batched else sum(counts) + UNUSED
        sources = self.total_rows // p.slots + 5
        left = rng.standard_normal((sources if p.gathered is LEFT else self.total_rows, p.p), "f4")
        right = rng.standard_normal((sources if p.gathered is RIGHT else self.total_rows, p.q), "f4")
        self.indices = None if p.gathered is NONE else rng.integers(0, sources * p.slots, self.total_rows).astype("i4")
        if self.indices is not None:
            self.indices[self.total_rows if batched else sum(counts):] = -1
        self.left, self.right = aligned(left, p.input), aligned(right, p.input)
        shape = (experts, splits, p.p, p.q)
        before = rng.standard_normal(shape, "f4") if p.accumulate else np.full(shape, np.nan, "f4")
        self.d = aligned(before, p.output)
        self.poison = self.d[..., p.q:].copy()
        table = np.array(rows or (np.cumsum(counts) if p.rows_format is RowsFormat.ends else counts)).reshape(p.ranks, experts)
        self.rows = np.pad(table, ((0, 0), (0, 3 * (p.ranks > 1))), constant_values=99).astype(f"i{p.rows_bits // 8}")

        left, right = (decode(encode(x, p.input), p.input).astype("f8") for x in (left, right))
        if p.gathered is LEFT:
            left = left[self.sources(left)]
        elif p.gathered is RIGHT:
            right = right[self.sources(right)]
        before = decode(encode(before, p.output), p.output)[:, 0].astype("f8")
        self.want = before if p.accumulate else np.zeros_like(before)
        begins = np.arange(experts) * room if batched else np.cumsum(counts) - counts
        for run, (begin, count) in enumerate(zip(begins, counts)):
            mine = slice(begin, begin + count)
            self.want[run % experts] += left[mine].T @ right[mine]

    def sources(self, operand: np.ndarray) -> np.ndarray:
        return (self.indices // self.problem.slots).clip(0, len(operand) - 1)

    def launch(self, config: OuterXeConfig, groups: int, seed: int = 0):
        from xesim import Memory
        memory, addresses = Memory(), None
        if self.indices is not None:        # as ops/grouped_outer.row_addresses
            operand = self.left if self.problem.gathered is LEFT else self.right
            addresses = memory.map(operand) + self.sources(operand).astype("i8") * operand[0].nbytes
        d, i8 = self.d, np.int64
        stats = kernel_of(self.problem, config).launch(groups * config.work_group_size, config.work_group_size, [
            self.left, self.right, d, self.rows, self.indices, addresses, np.zeros(QUEUE_WORDS, "i4"),
            np.full((num_entries(len(d), self.problem.ranks) + len(d), RECORD_BYTES // 4), -7, "i4"), i8(self.total_rows),
            i8(len(self.left)), i8(len(self.right)), i8(self.left.shape[1]), i8(self.right.shape[1]), i8(d.shape[-1]),
            i8(d[0].size), i8(d[0, 0].size), i8(self.rows.shape[-1]), np.int32(len(d))], mem=memory, seed=seed)
        assert not stats.warnings, stats.warnings
        assert (d[..., self.problem.q:] == self.poison).all(), "written beyond the columns"
        return stats

    def check(self) -> None:
        got = decode(self.d[..., :self.problem.q].copy(), self.problem.output).astype("f8").sum(1)
        rms = np.sqrt((self.want ** 2).mean())
        assert (np.abs(got - self.want) / (np.abs(self.want) + rms)).max() < TOLERANCE[self.problem.output]


def run(problem: OuterProblem, config: OuterXeConfig | None = None, counts=RAGGED, groups: int = 5, splits: int = 1) -> None:
    config = replace(config or xe_outer_config(problem), splits=splits)
    case = Case(problem, list(counts), splits)
    stats = case.launch(config, groups)
    case.check()
    REPORT.append(f"outer {problem.output.value} {problem.gathered.value} {problem.p}x{problem.q}, tile {config.tile_rows}x"
                  f"{config.tile_columns}, splits {splits}: {stats.total} instructions, {stats.dpas} dpas")


def small(problem: OuterProblem) -> OuterXeConfig:
    """Tiles of four sub-groups."""
    rows, columns = (128, 64) if problem.gathered is RIGHT else (64, 128)
    return replace(xe_outer_config(problem), tile_rows=rows, tile_columns=columns)


@pytest.mark.few(2)
@pytest.mark.parametrize("accumulate", [False, True], ids=["", "accumulate"])
@pytest.mark.parametrize("gathered", list(Gathered))
@pytest.mark.parametrize("output", [BF16, F16, F32])
def test_tails(output, gathered, accumulate):
    """Of P, Q and rows."""
    problem = OuterProblem(80, 144, F16 if output is F16 else BF16, output, gathered=gathered, slots=3, accumulate=accumulate)
    run(problem, small(problem))


@pytest.mark.parametrize("gathered", [*(pytest.param(side, marks=pytest.mark.full) for side in (NONE, LEFT)), RIGHT])
def test_rows_shared_out(gathered):
    problem = OuterProblem(112, 80, BF16, F32, gathered=gathered)
    run(problem, small(problem), [200, 0, 1, 33, 64, 97], splits=3)


@pytest.mark.few(1)
@pytest.mark.parametrize("p, q", [(48, 304), (272, 64)])
@pytest.mark.parametrize("gathered", list(Gathered))
def test_default_tiles(gathered, p, q):
    run(OuterProblem(p, q, BF16, BF16, gathered=gathered, slots=2), counts=[5, 31, 3])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("rows_format", list(RowsFormat))
@pytest.mark.parametrize("gathered", [NONE, RIGHT])
def test_more_experts_than_lanes(gathered, rows_format, bits):
    problem = OuterProblem(64, 64, BF16, F32, rows_format, bits, gathered=gathered)
    run(problem, small(problem), [0, 3, 17, 0, 1] * 8, groups=7)


@pytest.mark.parametrize("gathered, splits", [
    (LEFT, 1), (NONE, 3), *(pytest.param(side, 1, marks=pytest.mark.full) for side in (NONE, RIGHT))])
def test_rows_of_several_ranks(gathered, splits):
    """Runs of a row, of whole steps and of none; an expert without rows, a rank without rows."""
    problem = OuterProblem(80, 144, BF16, F32, gathered=gathered, slots=3, ranks=4)
    run(problem, small(problem), [70, 0, 1, 33] + [0, 0, 0, 0] + [2, 0, 64, 31] + [0, 0, 1, 95], splits=splits)


@pytest.mark.few(1)
@pytest.mark.parametrize("gathered", list(Gathered))
@pytest.mark.parametrize("rows", [[-5, 2**30, 7], [2**31 - 1] * 3, [-2**31, -1, 2**31 - 1]], ids=str)
def test_garbage_in_the_counts_touches_nothing_outside(rows, gathered):
    problem = OuterProblem(64, 64, BF16, F32, gathered=gathered, slots=2)
    Case(problem, [40, 3, 30], rows=rows).launch(small(problem), groups=3)
