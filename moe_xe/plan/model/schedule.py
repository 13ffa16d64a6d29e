"""A host-side model of the tile queue: the tiles a launch visits, in order, and how well they fill the device.

The same decomposition as sycl_kernels/include/moe_xe/queue/tile_list.hpp, from the same constants.
"""
from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..gemm.config import Schedule, TileConfig


@dataclass(frozen=True)
class Tile:
    """Rows [row, row + rows) of the sorted rows and columns from `column` on, computed by the tile of this height; which part of K."""
    expert: int
    height: int
    row: int
    rows: int
    column: int
    part: int = 0


def cut_rows(rows: int, heights: Sequence[int], min_fill_eighths: int) -> list[int]:
    """The heights that one expert's rows are cut into, tallest first."""
    cut: list[int] = []
    for i, height in enumerate(heights):
        fit, left = divmod(max(rows, 0), height)
        if left and (i == len(heights) - 1 or left * 8 >= height * min_fill_eighths):
            fit += 1
        cut += [height] * fit
        rows -= fit * height
    return cut


# Of one expert: how many, or how many of each rank, where rows come by rank and, within a rank, by expert.
Rows = int | tuple[int, ...]


def num_rows(rows: Rows) -> int:
    return sum(rows) if isinstance(rows, tuple) else rows


def runs_of(rows: Rows) -> tuple[int, ...]:
    """The rows that are neighbours."""
    return rows if isinstance(rows, tuple) else (rows,)


def over_ranks(rows: int, ranks: int) -> Rows:
    """An expert's rows where all ranks have about as many."""
    return tuple(evenly(rows, ranks)) if ranks > 1 else rows


def evenly(total: int, shares: int) -> list[int]:
    """Whole numbers of this sum, about equal."""
    share, more = divmod(total, shares)
    return [share + (place < more) for place in range(shares)]


def cut_of(rows: Rows, config: TileConfig) -> tuple[int, ...]:
    """The heights of one expert's row tiles."""
    return _cut(rows, config.heights, config.min_fill_eighths)


@functools.lru_cache(maxsize=1 << 14)
def _cut(rows: Rows, heights: tuple[int, ...], min_fill_eighths: int) -> tuple[int, ...]:
    return tuple(height for run in runs_of(rows) for height in cut_rows(run, heights, min_fill_eighths))


def tiles(tokens_per_expert: Sequence[Rows], n: int, config: TileConfig) -> Iterator[Tile]:
    """All tiles of a launch in the order of their numbers.

    Experts by falling size (powers of two), then by id; an expert's tiles, in order of their rows, in groups of `raster_group` row
    tiles, rows fastest within a group. The parts of a tile's K are neighbours, each with a number of its own.
    """
    columns = range(0, n, config.tile_width)
    row_tiles: list[list[tuple[int, int, int]]] = [[] for _ in tokens_per_expert]     # of each expert: height, first row, rows
    begin = 0
    for of_rank in zip(*map(runs_of, tokens_per_expert)):
        for of_expert, rows in zip(row_tiles, of_rank):
            row, begin = begin, begin + rows
            for height in cut_rows(rows, config.heights, config.min_fill_eighths):
                of_expert.append((height, row, min(height, begin - row)))
                row += height
    for expert in sorted(range(len(tokens_per_expert)), key=lambda e: -int(num_rows(tokens_per_expert[e])).bit_length()):
        for first in range(0, len(row_tiles[expert]), config.raster_group):
            for column in columns:
                for height, row, rows in row_tiles[expert][first:first + config.raster_group]:
                    for part in range(config.splits):
                        yield Tile(expert, height, row, rows, column, part)


@dataclass(frozen=True)
class ScheduleReport:
    """How one launch fills the device, a tile's cost being its computed rows x width (useful work: rows x columns), and an equal share
    of it that of each part of its K."""
    cores: int
    num_tiles: int
    tiles_per_height: dict[int, int]
    useful: int
    computed: int
    makespan: int

    @property
    def occupancy(self) -> float:
        """Useful / computed work: what raggedness costs."""
        return self.useful / self.computed if self.computed else 1.0

    @property
    def efficiency(self) -> float:
        """Useful work / (makespan x cores): raggedness and the idle tail together."""
        return self.useful / (self.makespan * self.cores) if self.makespan else 1.0


def simulate(tokens_per_expert: Sequence[Rows], n: int, config: TileConfig, cores: int) -> ScheduleReport:
    """Runs the queue on `cores` equal work-groups."""
    if cores < 1:
        raise ValueError(f"cores must be at least 1, got {cores}")
    busy = [0] * cores
    per_height = {height: 0 for height in config.heights}
    number = computed = num_tiles = 0
    for number, tile in enumerate(tiles(tokens_per_expert, n, config), start=1):
        cost = -(-config.computed_rows(tile.height, tile.rows) * config.tile_width // config.splits)
        computed += cost
        if tile.part == 0:
            num_tiles += 1
            per_height[tile.height] += 1
        if config.schedule is Schedule.static:
            busy[(number - 1) % cores] += cost
        else:
            heapq.heappush(busy, heapq.heappop(busy) + cost)
    return ScheduleReport(cores, num_tiles, per_height, sum(map(num_rows, tokens_per_expert)) * n, computed, max(busy))
