"""The configurations of a grouped GEMM on an Xe GPU that the cost model prefers.

enumerate (configs.py) -> filter (rules.py) -> score, here. docs/choosing.md explains it.
"""
from __future__ import annotations

import functools
import itertools
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import replace

from ..gemm.config import Schedule, XeConfig
from ..gemm.splits import possible_splits
from ..model.cost import Prediction, own_kernel, predict
from ..model.devices import DeviceRecord
from ..model.schedule import Rows, cut_of, num_rows, over_ranks
from ..problem import GroupedGemmProblem
from .configs import ALIKE, enumerate_configs, taller_tile
from .rules import check_xe_config

__all__ = ["best_xe_configs", "check_xe_config", "choose_xe_config", "likely_loads"]

MOST_MEAN_ROWS = 1024           # rows an expert from which on the choice is always the same
LOOKED_AT = 16                  # candidates for each of the best configurations: many differ in tiles that no load uses
TWINS = 2                       # how many of the best configurations may have the same main tile

# Loads, as rows of equal shares of the experts where the mean is 1: all alike; about what random routing gives (with 50
# rows an expert); what was recorded, the mean of gpt-oss-20b's 24 layers (bench/workloads.recorded_layers).
EVEN = (1.0,)
RANDOM = (1.2, 1.05, 0.95, 0.8)
RECORDED = (5.84, 3.49, 2.04, 1.40, 0.97, 0.70, 0.50, 0.35, 0.25, 0.17, 0.11, 0.08, 0.05, 0.03, 0.01, 0.01)


class Scores:
    """What configurations cost for these loads, each the rows of every expert: seconds of all of them together."""

    def __init__(self, problem: GroupedGemmProblem, loads: Sequence[tuple[Rows, ...]], device: DeviceRecord,
                 configs: Sequence[XeConfig]):
        self.problem, self.loads, self.device = problem, loads, device
        self._exact: dict[XeConfig, float] = {}
        self._even = {config: self._predictions(config, even=True) for config in configs}

    def seconds(self, config: XeConfig) -> float:
        """With the queue simulated."""
        if config not in self._exact:
            self._exact[config] = sum(prediction.seconds for prediction in self._predictions(config))
        return self._exact[config]

    def least(self, config: XeConfig) -> float:
        """A lower bound: all work shared out evenly."""
        return sum(prediction.seconds for prediction in self._even[config])

    def frugality(self, config: XeConfig) -> tuple:
        """What decides between configurations of alike times: fewest parts of K, fewest instructions, tallest tiles, shortest prefetch."""
        issue = sum(prediction.parts["issue"] for prediction in self._even[config])
        return config.splits, issue, -config.heights[0], config.prefetch_distance

    def ranked(self, count: int) -> list[XeConfig]:
        """The `count` best and possibly more, best first. Simulated is only what can still be among them."""
        order = sorted(self._even, key=self.least)
        enough = self.least(order[0]) * ALIKE
        if count == 1:      # where all is bound by memory, many are as good as can be
            alike = sorted((config for config in order if self.least(config) <= enough), key=self.frugality)
            if found := next((config for config in alike if self.seconds(config) <= enough), None):
                return [found]
        times: list[float] = []
        for config in order:
            if len(times) >= count and self.least(config) > times[count - 1] * ALIKE:
                break
            insort(times, self.seconds(config))
        least = times[0] or 1.0     # without rows all take no time

        def rank(config: XeConfig) -> tuple:
            return int(math.log(max(self.seconds(config) / least, 1.0), ALIKE)), *self.frugality(config)

        return sorted(order[:len(times)], key=rank)

    def _predictions(self, config: XeConfig, even: bool = False) -> list[Prediction]:
        kernel = own_kernel(self.problem, config, self.device)
        return [predict(self.problem, rows, kernel, self.device, launches=0, even=even) for rows in self.loads]


def candidates(problem: GroupedGemmProblem, device: DeviceRecord, most_rows: int, loads: Sequence[tuple[Rows, ...]],
               schedule: Schedule = Schedule.dynamic) -> list[XeConfig]:
    """What `enumerate_configs` leaves; with K shared out, too, where none of the loads has a tile for every core, nor may be taller
    than `most_rows` says."""
    configs, _ = enumerate_configs(problem, device, most_rows, schedule)
    if most_rows >= len(loads[0]) * MOST_MEAN_ROWS:
        return configs
    return configs + [replace(config, splits=splits) for config in configs
                      for splits in min((possible_splits(problem, config, rows, device.xe_cores) for rows in loads), key=len)]


# ---- the default

def likely_loads(total_rows: int, num_experts: int) -> tuple[tuple[int, ...], ...]:
    """Rows of each expert, where only their sum is known: from all alike to as uneven as recorded."""
    return tuple(_spread(total_rows, num_experts, weights) for weights in (EVEN, RANDOM, RECORDED))


def _spread(total_rows: int, num_experts: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers of this sum in the proportions of weights, each of which is for an equal share of the experts."""
    ends, parts = [0.0, *itertools.accumulate(weights)], len(weights)

    def until(expert: int) -> int:
        part, rest = divmod(expert * parts, num_experts)
        inside = weights[part] * rest / num_experts if rest else 0.0
        return round(total_rows * (ends[part] + inside) / ends[-1])

    return tuple(until(expert + 1) - until(expert) for expert in range(num_experts))


@functools.lru_cache(maxsize=1024)
def _choose(problem: GroupedGemmProblem, total_rows: int, num_experts: int, device: DeviceRecord, schedule: Schedule) -> XeConfig:
    loads = [tuple(over_ranks(rows, problem.ranks) for rows in load) for load in likely_loads(total_rows, num_experts)]
    scores = Scores(problem, loads, device, candidates(problem, device, total_rows, loads, schedule))
    return _with_taller_tiles(scores, scores.ranked(1)[0], total_rows)


def _with_taller_tiles(scores: Scores, config: XeConfig, most_rows: int) -> XeConfig:
    """The same with taller tiles on top, for loads that are even less even, as long as these take no longer."""
    longest = scores.seconds(config) * ALIKE
    while (taller := taller_tile(scores.problem, config, most_rows, scores.device)) and scores.seconds(taller) <= longest:
        config = taller
    return config


def choose_xe_config(problem: GroupedGemmProblem, total_rows: int, num_experts: int, device: DeviceRecord,
                     schedule: Schedule = Schedule.dynamic) -> XeConfig:
    """The configuration with the least predicted time where only the sum of all experts' rows is known.

    The time is of several loads together, from all experts alike to as uneven as recorded; of those within 1 % of the least,
    the one that issues the fewest instructions. total_rows counts as the next power of two, so that a shape needs few
    kernels. Equal calls share the result. Raises ValueError for a device without an architecture.
    """
    rows = min(1 << max(total_rows - 1, 0).bit_length(), num_experts * MOST_MEAN_ROWS)
    return _choose(problem, rows, num_experts, device, schedule)


# ---- for known rows

def best_xe_configs(problem: GroupedGemmProblem, rows_per_expert: Sequence[Rows], device: DeviceRecord, count: int) -> list[XeConfig]:
    """At most `count` distinct configurations for these rows, the least predicted time first: what an autotuner measures.

    Really different ones: at most two have the same main tile, the one with most of the rows, and these differ in how far
    ahead they prefetch. Raises ValueError for count < 1 or a device without an architecture.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rows = tuple(rows_per_expert)
    scores = Scores(problem, [rows], device, candidates(problem, device, max(map(num_rows, rows), default=1), [rows]))
    found: dict[tuple, list[XeConfig]] = {}     # by main tile
    for config in scores.ranked(count * LOOKED_AT):
        config = _with_taller_tiles(scores, config, sum(map(num_rows, rows)))
        twins = found.setdefault(_main_tile(rows, config), [])
        if len(twins) < TWINS and all(config.prefetch_distance != twin.prefetch_distance for twin in twins):
            twins.append(config)
        if sum(map(len, found.values())) == count:
            break
    return sorted(itertools.chain.from_iterable(found.values()), key=scores.seconds)


def _main_tile(rows_per_expert: Sequence[Rows], config: XeConfig) -> tuple[int, int, int, int]:
    """Height, width and a sub-group's rows and columns of the tile that computes the most rows."""
    shares = dict.fromkeys(config.heights, 0)
    for rows in rows_per_expert:
        for height in cut_of(rows, config):
            shares[height] += height
    index = max(range(len(config.heights)), key=lambda i: shares[config.heights[i]])
    return config.heights[index], config.tile_width, config.sub_group_rows[index], config.sub_group_columns[index]
