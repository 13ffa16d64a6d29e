"""Instructions that bmg executes in xesim: of a sub-group's tile outside the K loop, and of whole launches.

    PYTHONPATH=.:tools python -m tests.xe.tile_cost [words that a name must have]
"""
from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from moe_xe.bench.workloads import recorded_layers
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale

from .case import EKN, ENK, Case, default_config

BF16, F32 = Dtype.bf16, Dtype.f32
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=7.0)
KINDS = {
    "plain": dict(output=BF16),
    "plain f32": dict(output=F32),
    "gathered": dict(output=BF16, gathered=True),
    "silu of halves": dict(output=BF16, gathered=True, slots=8, activation=Activation()),
    "swiglu of neighbours, bias": dict(output=BF16, gathered=True, slots=4, activation=OAI, bias=BF16),
    "scattered f32": dict(output=F32, scattered=True, row_scale=RowScale.outputs),
    "scattered f32, bias": dict(output=F32, scattered=True, row_scale=RowScale.outputs, bias=BF16),
    "scattered bf16": dict(output=BF16, scattered=True, row_scale=RowScale.outputs),
}
LAUNCHES = {    # rows of every expert, N, K
    "8 experts of 256 rows": ([256] * 8, 1024, 512),
    "16 experts of 3 rows": ([3] * 16, 1024, 512),
    "recorded layer 0": (recorded_layers()[0], 512, 256),
    "recorded layer 12": (recorded_layers()[12], 512, 256),
}
XE_CORES = 20

ROWS, COLUMNS = 32, 64      # of a sub-group: two by two of them are a tile
ROUND = 256                 # along K: a multiple of every K loop's round
STEP = 32                   # along K: 64 bytes


@dataclass(frozen=True)
class TileCost:
    """Instructions of one sub-group. step: of 64 bytes along K; tile: of one more tile outside the K loop; launch: of a launch,
    outside its tiles."""
    step: float
    tile: float
    launch: float

    def __str__(self) -> str:
        return f"{self.tile:.0f} a tile, {self.step:.1f} a step, {self.launch:.0f} a launch"


def problem_of(kind: str, layout) -> GroupedGemmProblem:
    return GroupedGemmProblem(2 * COLUMNS, ROUND, BF16, weights=layout, **KINDS[kind])


def tile_cost(problem: GroupedGemmProblem) -> TileCost:
    """Of whole tiles, all of one expert."""
    config = XeConfig(heights=(2 * ROWS,), tile_width=problem.n, raster_group=8, min_fill_eighths=1, schedule=Schedule.dynamic,
                      sub_group_rows=(ROWS,), sub_group_columns=(COLUMNS,), prefetch_distance=3)

    def instructions(k: int, tiles: int) -> float:
        case = Case(replace(problem, k=k), [2 * ROWS * tiles])
        stats = case.launch(config, groups=1)
        case.check()
        return stats.total / 4

    short, long, more = (instructions(k, tiles) for k, tiles in ((2 * ROUND, 1), (4 * ROUND, 1), (2 * ROUND, 3)))
    loop = long - short     # of 2 * ROUND
    tile = (more - short) / 2
    return TileCost(loop / (2 * ROUND // STEP), tile - loop, short - tile)


def per_useful(layout, rows: list[int], n: int, k: int, groups: int = XE_CORES) -> float:
    """Instructions of a plain launch with its default configuration, per 1000 multiply-adds that the result needs."""
    problem = GroupedGemmProblem(n, k, BF16, BF16, layout)
    case = Case(problem, list(rows))
    stats = case.launch(default_config(problem, n, k, sum(rows), len(rows)), groups)
    case.check()
    return 1000 * stats.total / (sum(rows) * n * k)


def main(words: list[str]) -> None:
    for layout in (ENK, EKN):
        for kind in KINDS:
            if all(word in f"{kind}, {layout.value}" for word in words):
                print(f"{kind}, {layout.value}: {tile_cost(problem_of(kind, layout))}")
        for name, launch in LAUNCHES.items():
            if all(word in f"{name}, {layout.value}" for word in words):
                print(f"{name}, {layout.value}: {per_useful(layout, *launch):.2f} instructions per 1000 useful multiply-adds")


if __name__ == "__main__":
    main(sys.argv[1:])
