"""The weights' gradient's generic main loop as BMG code, executed by xesim; memory around the operands is unmapped there."""
from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from moe_xe.isa import ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.outer_source import KERNEL_NAME, generate
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.plan.launch import QUEUE_WORDS, RECORD_BYTES
from moe_xe.plan.outer.config import Gathered, OuterGenericConfig, OuterProblem
from moe_xe.plan.outer.heuristics import generic_outer_config
from moe_xe.plan.problem import FLOATS, Dtype

from .case import decode, encode, missing, padded

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

COUNTS = [70, 0, 1, 16, 37]
UNUSED = 5      # rows beyond the experts'


@cache
def image(problem: OuterProblem, config: OuterGenericConfig) -> bytes:
    root = sources_dir()
    return spirv.compile_to_spirv(generate(problem, config), [f"-I{root / 'include'}", f"-I{root}"])


@cache
def build(problem: OuterProblem, config: OuterGenericConfig, device: str = "bmg"):
    return ocloc.build(image(problem, config), device)


def run(problem: OuterProblem, config: OuterGenericConfig, groups: int, padding: int = 3) -> None:
    from xesim import Kernel
    rng = np.random.default_rng(groups)
    total, experts, splits = sum(COUNTS) + UNUSED, len(COUNTS), config.splits
    indices = rng.integers(0, 29 * problem.slots, total).astype("i4")

    def operand(side: Gathered, columns: int) -> tuple[np.ndarray, np.ndarray]:
        gathered = problem.gathered is side
        values = rng.standard_normal((29 if gathered else total, columns), "f4")
        read = decode(encode(values, problem.input), problem.input).astype("f8")
        return padded(values, problem.input, 0, padding), read[indices // problem.slots] if gathered else read

    (left, left_values), (right, right_values) = operand(Gathered.left, problem.p), operand(Gathered.right, problem.q)
    before = rng.standard_normal((experts, problem.p, splits, problem.q), "f4") if problem.accumulate else \
        np.full((experts, problem.p, splits, problem.q), np.nan, "f4")
    d = padded(before, problem.output, 0, 0, 0, padding)
    columns = d.shape[-1]
    i8 = np.int64
    arguments = [left, right, d, np.array(COUNTS, f"i{problem.rows_bits // 8}"),
                 None if problem.gathered is Gathered.none else indices, None, np.zeros(QUEUE_WORDS, "i4"),
                 np.full((2 * experts, RECORD_BYTES // 4), -7, "i4"), i8(total), i8(len(left)), i8(len(right)), i8(left.shape[1]), i8(right.shape[1]), i8(splits * columns), i8(problem.p * splits * columns),
                 i8(columns), i8(0), np.int32(experts)]
    size = config.work_group_size
    stats = Kernel(build(problem, config), KERNEL_NAME).launch(groups * size, size, arguments, seed=groups)
    assert not stats.warnings, stats.warnings

    got = decode(d[..., :problem.q].copy(), problem.output).astype("f8")
    ends = np.cumsum(COUNTS)
    want = np.stack([left_values[end - count:end].T @ right_values[end - count:end] for count, end in zip(COUNTS, ends)])
    if problem.accumulate:
        want += decode(encode(before[:, :, 0], problem.output), problem.output)
    assert np.isnan(decode(d[..., problem.q:].copy(), problem.output)).all(), "written beyond Q"
    tolerance = {Dtype.bf16: 3e-2, Dtype.f16: 4e-3, Dtype.f32: 1e-5}[problem.output]
    assert np.abs(got.sum(2) - want).max() / np.sqrt((want ** 2).mean()) < tolerance


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype, output", [(Dtype.bf16, Dtype.bf16), (Dtype.f16, Dtype.f32), (Dtype.f32, Dtype.f16)])
@pytest.mark.parametrize("gathered, accumulate, bits", [(Gathered.none, False, 64), (Gathered.right, False, 32), (Gathered.left, True, 32)])
def test_odd_sizes(dtype, output, gathered, accumulate, bits):
    problem = OuterProblem(75, 37, dtype, output, rows_bits=bits, gathered=gathered, slots=3, accumulate=accumulate)
    config = OuterGenericConfig(32, 32, 1, sub_group_rows=16, sub_group_columns=16)
    for groups in (1, 5):
        run(problem, config, groups)


def test_the_configuration_of_the_heuristics():
    problem = OuterProblem(290, 135, Dtype.bf16, Dtype.bf16)
    run(problem, generic_outer_config(problem), groups=3)


def test_rows_shared_out():
    run(OuterProblem(33, 20, Dtype.bf16, Dtype.f32), OuterGenericConfig(32, 32, 3, sub_group_rows=32, sub_group_columns=16), groups=4)


@pytest.mark.few(1)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("gathered, accumulate", [(Gathered.none, True), (Gathered.left, False), (Gathered.right, True)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_spills(dtype, gathered, accumulate, device):
    problem = OuterProblem(2880, 2881, dtype, dtype, gathered=gathered, slots=3, accumulate=accumulate)
    summary = summarize(build(problem, generic_outer_config(problem), device), KERNEL_NAME)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
    assert summary.grf == 128
