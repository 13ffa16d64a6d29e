"""The configurations for a problem on an Xe GPU: which are out and why, and which one the cost model prefers.

enumerate -> filter, each rule with its reason -> score. heuristics.py decides whether to ask.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .config import Schedule, XeConfig
from .cost_model import STEP_BYTES, Prediction, TileCost, counted_instructions, own_kernel, predict, tile_cost, variant_of
from .devices import DeviceRecord
from .problem import GroupedGemmProblem, WeightLayout

Key = TypeVar("Key")
Cost = TypeVar("Cost", TileCost, Prediction)

HEIGHTS = (256, 128, 64, 32, 16)
WIDTHS = (512, 384, 256, 192, 128, 64)
PREFETCH_DISTANCE = 3           # for which instructions were counted
RASTER_GROUP, MIN_FILL_EIGHTHS = 8, 7
REGISTERS = 256                 # of a thread
OTHER_REGISTERS = 16            # addresses and payloads, what a thread needs beside sums and operands
THREADS_PER_ENGINE = 4          # with 256 registers each
MOST_PADDING = 1.25             # of N, beside the width that pads least
LINES = 32                      # of a prefetch message
GATHERED_SUMS = 32 * 64         # of a sub-group that has no registers to spare (compiled beside a shorter tile: 192 bytes spill)
QUEUE_SLM = 1 << 10             # the tile queue's share of L1, at most
ALIKE = 1.01                    # times that the model cannot tell apart: then fewer instructions are better


@dataclass(frozen=True)
class Rejected:
    """A sub-group shape, tile or configuration that is out, and the rule that says so."""
    what: str
    reason: str


def sub_group_reason(problem: GroupedGemmProblem, rows: int, columns: int, device: DeviceRecord) -> str | None:
    """Why no sub-group can compute rows x columns; None if one can."""
    registers = rows * columns // 16 + rows + columns + OTHER_REGISTERS
    if registers > REGISTERS:
        return f"registers: sums, operands of a step and addresses take {registers} of {REGISTERS}"
    counted = counted_instructions()[device.architecture.counted][variant_of(problem)]
    if f"{rows}x{columns}" not in counted:
        return "spills: not among the shapes that were compiled and are known not to spill"
    block = 8 if problem.weights is WeightLayout.enk else 16
    if problem.pairs and columns < 2 * block:
        return f"pairs: gate and up values need {2 * block} columns"
    return None


def tile_reason(problem: GroupedGemmProblem, height: int, width: int, rows: int, columns: int,
                device: DeviceRecord) -> str | None:
    """Why a tile cannot be shared out to sub-groups of rows x columns; None if it can."""
    if height % rows or width % columns:
        return "sub-groups: do not divide the tile"
    sub_groups, most = height // rows * (width // columns), THREADS_PER_ENGINE * device.architecture.engines
    if sub_groups > most:
        return f"threads: {sub_groups} sub-groups, an Xe core has {most}"
    if width % sub_groups or (width // sub_groups > LINES and width // sub_groups % LINES):
        return "prefetch: the columns' lines cannot be shared out evenly"
    if (problem.weights is WeightLayout.enk and problem.gathered and rows * columns >= GATHERED_SUMS and
            width // sub_groups > LINES):
        return "spills: gathered tokens' addresses leave no registers for two messages of prefetched columns"
    if -(-height // sub_groups) > LINES:
        return f"prefetch: more than {LINES} rows a sub-group"
    if problem.pairs and sub_groups % 2:
        return "prefetch: gates and up values need an even number of sub-groups"
    if problem.weights is WeightLayout.ekn:     # a step's rows of K are shared out, too
        lines = min(width // sub_groups, LINES)
        step = STEP_BYTES // problem.input.size
        if step % min(lines, step) or sub_groups // (2 if problem.pairs else 1) % (step // min(lines, step)):
            return "prefetch: the rows of K cannot be shared out evenly"
    return None


def width_reason(problem: GroupedGemmProblem, width: int) -> str | None:
    """Why tiles are not so wide; None if they may be."""
    padded, least = (min(-(-problem.n // w) * w for w in some) for some in ((width,), WIDTHS))
    if padded > MOST_PADDING * least:
        return f"tail: pads N = {problem.n} to {padded}, another width to {least}"
    return None


def config_reason(config: XeConfig, device: DeviceRecord) -> str | None:
    """Why a whole configuration is out; None if it is not."""
    ahead = (config.prefetch_distance + 1) * (config.heights[0] + config.tile_width) * STEP_BYTES + QUEUE_SLM
    if ahead > device.architecture.l1_bytes:
        return f"L1: {ahead} bytes of prefetched lines and SLM, an Xe core has {device.architecture.l1_bytes}"
    return None


def sub_group_shapes(problem: GroupedGemmProblem) -> Iterator[tuple[int, int]]:
    """All that dpas allows: rows and columns are multiples of its 8 and 16, by the operand that they are."""
    row_block, column_block = (16, 8) if problem.weights is WeightLayout.enk else (8, 16)
    for rows in (8, 16, 32, 64):
        for columns in (8, 16, 32, 64, 128):
            if rows % row_block == 0 and columns % column_block == 0:
                yield rows, columns


def enumerate_configs(problem: GroupedGemmProblem, device: DeviceRecord, most_rows: int,
                      schedule: Schedule = Schedule.dynamic) -> tuple[list[XeConfig], list[Rejected]]:
    """Every configuration that the rules leave for experts of up to `most_rows` rows, and what they reject.

    The tallest tile's sub-groups set the work-group's size; each shorter one takes the shape that the model finds fastest
    among those with no more sub-groups.
    """
    configs, rejected, shapes = [], [], []
    for rows, columns in sub_group_shapes(problem):
        if reason := sub_group_reason(problem, rows, columns, device):
            rejected.append(Rejected(f"sub-groups {rows}x{columns}", reason))
        else:
            shapes.append((rows, columns))
    tallest = next((height for height in reversed(HEIGHTS) if height >= most_rows), HEIGHTS[0])
    for width in WIDTHS:
        if reason := width_reason(problem, width):
            rejected.append(Rejected(f"width {width}", reason))
            continue
        fitting: dict[int, list[tuple[int, int]]] = {}
        for height in (h for h in HEIGHTS if h <= tallest):
            fitting[height] = []
            for rows, columns in shapes:
                if reason := tile_reason(problem, height, width, rows, columns, device):
                    rejected.append(Rejected(f"{height}x{width} in {rows}x{columns}", reason))
                else:
                    fitting[height].append((rows, columns))
        for first in fitting:
            for shape in fitting[first]:
                config = _one_tile(first, width, shape, schedule)
                if reason := config_reason(config, device):
                    rejected.append(Rejected(f"{first}x{width} in {shape[0]}x{shape[1]}", reason))
                else:
                    configs.append(_with_shorter_tiles(problem, config, fitting, device))
    return configs, rejected


def _one_tile(height: int, width: int, shape: tuple[int, int], schedule: Schedule = Schedule.dynamic) -> XeConfig:
    return XeConfig((height,), width, RASTER_GROUP, MIN_FILL_EIGHTHS, schedule, shape[:1], shape[1:], PREFETCH_DISTANCE)


def _with_shorter_tiles(problem: GroupedGemmProblem, config: XeConfig, fitting: dict[int, list[tuple[int, int]]],
                        device: DeviceRecord) -> XeConfig:
    for height in sorted(fitting, reverse=True):
        costs = {(rows, columns): _tile_cost(problem, height, config.tile_width, (rows, columns), device)
                 for rows, columns in fitting[height] if height // rows * (config.tile_width // columns) <= config.sub_groups[0]}
        if height < config.heights[0] and costs:
            rows, columns = _fastest(costs, lambda cost: cost.issue)
            config = replace(config, heights=(*config.heights, height), sub_group_rows=(*config.sub_group_rows, rows),
                             sub_group_columns=(*config.sub_group_columns, columns))
    return config


@functools.lru_cache(maxsize=4096)
def _tile_cost(problem: GroupedGemmProblem, height: int, width: int, shape: tuple[int, int], device: DeviceRecord) -> TileCost:
    return tile_cost(problem, own_kernel(problem, _one_tile(height, width, shape), device), device, 0)


def _fastest(costs: dict[Key, Cost], issue: Callable[[Cost], float]) -> Key:
    """The key of the least seconds; of those that are alike, the one of the fewest instructions."""
    best = min(cost.seconds for cost in costs.values())
    return min((key for key, cost in costs.items() if cost.seconds <= best * ALIKE), key=lambda key: issue(costs[key]))


def expected_rows(rows_per_expert: float, num_experts: int) -> tuple[int, ...]:
    """Rows of each expert where only the mean is known: all alike, or below one, as many experts with one row."""
    if rows_per_expert < 1:
        return (1,) * max(round(rows_per_expert * num_experts), 1)
    return (round(rows_per_expert),) * num_experts


@functools.lru_cache(maxsize=256)
def _choose(problem: GroupedGemmProblem, rows: tuple[int, ...], device: DeviceRecord, schedule: Schedule) -> XeConfig:
    """Simulates the queue only of what could still be best: the least time that each one's work allows says when to stop."""
    configs, _ = enumerate_configs(problem, device, max(rows, default=1), schedule)
    kernels = {config: own_kernel(problem, config, device) for config in configs}
    least = {config: predict(problem, rows, kernel, device, even=True).seconds for config, kernel in kernels.items()}
    found: dict[XeConfig, Prediction] = {}
    best = math.inf
    for config in sorted(configs, key=least.get):
        if least[config] > best * ALIKE:
            break
        found[config] = predict(problem, rows, kernels[config], device)
        best = min(best, found[config].seconds)
    return _fastest(found, lambda prediction: prediction.parts["issue"])


def choose_xe_config(problem: GroupedGemmProblem, rows_per_expert: float | Sequence[int], num_experts: int,
                     device: DeviceRecord, schedule: Schedule = Schedule.dynamic) -> XeConfig:
    """The configuration with the least predicted time for these rows of each expert, or for their mean.

    Of those within 1 % of it, the one that issues the fewest instructions.

    Equal calls share the result. A caller that knows the mean only should round it coarsely: each configuration is a kernel.
    Raises ValueError for a device without an architecture.
    """
    if device.architecture is None:
        raise ValueError(f"device must be an Xe GPU with an architecture, got {device.name}")
    rows = tuple(rows_per_expert) if isinstance(rows_per_expert, Sequence) else expected_rows(rows_per_expert, num_experts)
    return _choose(problem, rows, device, schedule)
