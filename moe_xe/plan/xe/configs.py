"""Every configuration of a grouped GEMM on an Xe GPU that the rules (rules.py) leave."""
from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..gemm.config import Schedule, XeConfig
from ..model.cost import TileCost, own_kernel, tile_cost
from ..model.devices import DeviceRecord
from ..problem import GroupedGemmProblem
from . import rules as xe_rules

Shape = tuple[int, int]         # rows and columns of a sub-group

HEIGHTS = (256, 128, 64, 32, 16)
TALLEST = (16, 64, 256)         # of a configuration: few, so that a shape needs few kernels
WIDTHS = (512, 384, 256, 192, 128, 64)
PREFETCH_DISTANCES = (3, 5, 8)
RASTER_GROUP, MIN_FILL_EIGHTHS = 8, 7
ALIKE = 1.01                    # times that the model cannot tell apart: then fewer instructions are better


@dataclass(frozen=True)
class Rejected:
    """A sub-group shape, tile or configuration that is out, and the rule that says so."""
    what: str
    reason: str


def sub_group_shapes(problem: GroupedGemmProblem) -> Iterator[tuple[int, int]]:
    """Powers of two of what dpas makes."""
    row_block, column_block = xe_rules.blocks(problem)
    rows = (row_block << i for i in range((64 // row_block).bit_length()))
    columns = [column_block << i for i in range((128 // column_block).bit_length())]
    return itertools.product(rows, columns)


def enumerate_configs(problem: GroupedGemmProblem, device: DeviceRecord, most_rows: int,
                      schedule: Schedule = Schedule.dynamic) -> tuple[list[XeConfig], list[Rejected]]:
    """Every configuration that the rules leave for experts of up to `most_rows` rows, and what they reject.

    The tallest tile's sub-groups set the work-group's size; each shorter one takes the shape that the model finds fastest
    among those with no more sub-groups. Raises ValueError for a device that is no Xe GPU.
    """
    most = xe_rules.most_sub_groups(device)
    configs, rejected = [], []
    heights = [height for height in HEIGHTS if height <= _tallest(most_rows)]
    for width in WIDTHS:
        if reason := xe_rules.width_reason(problem, width, WIDTHS):
            rejected.append(Rejected(f"width {width}", reason))
            continue
        fitting: dict[int, list[Shape]] = {height: [] for height in heights}
        for height, shape in itertools.product(heights, sub_group_shapes(problem)):
            if reason := _reason(problem, height, width, shape, device, most):
                rejected.append(Rejected("{}x{} in {}x{}".format(height, width, *shape), reason))
            else:
                fitting[height].append(shape)
        for first, distance in itertools.product(heights, PREFETCH_DISTANCES):
            for shape in fitting[first]:
                config = _one_tile(first, width, shape, distance, schedule)
                if reason := xe_rules.cache_reason(config, device):
                    rejected.append(Rejected("{}x{} in {}x{}, {} steps ahead".format(first, width, *shape, distance), reason))
                else:
                    configs.append(_with_shorter_tiles(problem, config, fitting, device))
    return configs, rejected


def _tallest(most_rows: int) -> int:
    """The smallest of a few heights that holds all rows: taller ones are never used."""
    return next((height for height in TALLEST if height >= most_rows), HEIGHTS[0])


def _reason(problem: GroupedGemmProblem, height: int, width: int, shape: Shape, device: DeviceRecord, most: int) -> str | None:
    return (xe_rules.sub_group_reason(problem, *shape) or xe_rules.shape_spills(problem, *shape, device) or
            xe_rules.tile_reason(problem, height, width, *shape, most) or
            xe_rules.tile_spills(problem, height, width, *shape))


def _one_tile(height: int, width: int, shape: Shape, prefetch_distance: int, schedule: Schedule = Schedule.dynamic) -> XeConfig:
    return XeConfig((height,), width, RASTER_GROUP, MIN_FILL_EIGHTHS, schedule, shape[:1], shape[1:], prefetch_distance)


def _with_shorter_tiles(problem: GroupedGemmProblem, config: XeConfig, fitting: dict[int, list[Shape]],
                        device: DeviceRecord) -> XeConfig:
    for height, shapes in fitting.items():      # taller ones first
        fewer = [shape for shape in shapes if _sub_groups(height, config.tile_width, shape) <= config.sub_groups[0]]
        if height < config.heights[0] and fewer:
            rows, columns = _fastest(problem, height, config, fewer, device)
            config = replace(config, heights=(*config.heights, height), sub_group_rows=(*config.sub_group_rows, rows),
                             sub_group_columns=(*config.sub_group_columns, columns))
    return config


def taller_tile(problem: GroupedGemmProblem, config: XeConfig, most_rows: int, device: DeviceRecord) -> XeConfig | None:
    """The configuration with the next taller tile that is possible on top; None if none is, or most_rows needs none."""
    least, most = config.sub_groups[0], xe_rules.most_sub_groups(device)
    for height in reversed(HEIGHTS):
        if config.heights[0] < height <= _tallest(most_rows):
            shapes = [shape for shape in sub_group_shapes(problem) if _sub_groups(height, config.tile_width, shape) >= least
                      and not _reason(problem, height, config.tile_width, shape, device, most)]
            if shapes:
                rows, columns = _fastest(problem, height, config, shapes, device)
                taller = replace(config, heights=(height, *config.heights), sub_group_rows=(rows, *config.sub_group_rows),
                                 sub_group_columns=(columns, *config.sub_group_columns))
                return None if xe_rules.cache_reason(taller, device) else taller
    return None


def _fastest(problem: GroupedGemmProblem, height: int, config: XeConfig, shapes: Iterable[Shape], device: DeviceRecord) -> Shape:
    """For a tile of this height; of those that are alike, the one of the fewest instructions."""
    costs = {shape: _tile_cost(problem, height, config.tile_width, shape, config.prefetch_distance, device) for shape in shapes}
    best = min(cost.seconds for cost in costs.values())
    return min((shape for shape in costs if costs[shape].seconds <= best * ALIKE), key=lambda shape: costs[shape].issue)


def _sub_groups(height: int, width: int, shape: Shape) -> int:
    return height // shape[0] * (width // shape[1])


@functools.lru_cache(maxsize=4096)
def _tile_cost(problem: GroupedGemmProblem, height: int, width: int, shape: Shape, prefetch_distance: int,
               device: DeviceRecord) -> TileCost:
    return tile_cost(problem, own_kernel(problem, _one_tile(height, width, shape, prefetch_distance), device), device, 0)
