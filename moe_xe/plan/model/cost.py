"""How long a grouped GEMM takes on an Xe GPU, from its tiles, counted instructions and the device's record.

docs/choosing.md has the formulae, where the constants come from, and how far the predictions are from measurements.
"""
from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from ..formats import Codes
from ..gemm.config import CpuConfig, Schedule, TileConfig, XeConfig
from ..problem import Dtype, GroupedGemmProblem
from .devices import DeviceRecord
from .schedule import Rows, Tile, cut_of, num_rows, tiles

STEP_BYTES = 64             # along K, of a step of the K loop
# Codes that are counted, by those that they stand for: as many instructions, or nearly so.
COUNTED_CODES = {Codes.int4: Codes.int4, Codes.uint4: Codes.int4, Codes.e2m1: Codes.e2m1, Codes.int8: Codes.int8, Codes.e4m3: Codes.e4m3,
                 Codes.e5m2: Codes.e4m3}
STEP_DPAS_SUMS = 64         # sums (rows x columns) that a step brings forward with one dpas: 128 sums, half a step each

# Fitted to the published measurements (plan/model/data/published.yaml); all else comes from the records.
MATRIX_EFFICIENCY = 0.90    # share of the matrix engines' peak that remains when nothing else limits: clocks under load
OVERLAP = 4.0               # exponent by which parts that overlap add up; infinite would be perfect overlap
LAUNCH_SECONDS = 12e-6      # from one kernel's end to the next one's start, in a stream that the host feeds


@dataclass(frozen=True)
class Code:
    """Instructions of one sub-group, dpas included: of a step of 64 bytes along K, and of a tile outside the K loop."""
    step: float
    tile: float


@dataclass(frozen=True)
class Kernel:
    """What runs: tiles, the instructions of a sub-group of so many rows and columns, and what else differs between libraries.

    groups_per_core: work-groups that share an Xe core. weight_bytes: of one weight in memory; None: as the input's.
    """
    config: XeConfig
    code: Callable[[int, int], Code]
    groups_per_core: int = 1
    weight_bytes: float | None = None


@dataclass(frozen=True)
class Prediction:
    """seconds: of one launch. parts: what each resource would take alone, spread evenly; tail: what uneven work adds to it.

    flops: useful ones.
    """
    seconds: float
    parts: dict[str, float]
    tail: float
    flops: float
    roofline_seconds: float

    @property
    def bound_by(self) -> str:
        """The resource that takes the longest, or "tail" where uneven work adds more than that."""
        return max({**self.parts, "tail": self.tail}.items(), key=lambda part: part[1])[0]

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12 if self.seconds else 0.0

    @property
    def roofline_share(self) -> float:
        """The least time that peak rate and bandwidth allow / the predicted one."""
        return self.roofline_seconds / self.seconds if self.seconds else 1.0


def overlapped(*parts: float) -> float:
    """The time of parts that mostly overlap: at least the longest, more where others come near it."""
    longest = max(parts)
    return longest * sum((part / longest) ** OVERLAP for part in parts) ** (1 / OVERLAP) if longest > 0 else 0.0


@functools.cache
def counted_instructions() -> dict:
    """plan/model/data/instructions: target -> variant -> shape -> counts."""
    tables = files(__package__).joinpath("data/instructions").iterdir()
    return {table.name.removesuffix(".yaml"): yaml.safe_load(table.read_text()) for table in tables if table.name.endswith(".yaml")}


def variant_of(problem: GroupedGemmProblem) -> str:
    """The kernel that instructions were counted for, in plan/model/data/instructions."""
    fused = " gathered" * problem.gathered + " pairs" * (problem.gathered and problem.pairs) + " scattered" * problem.scattered
    codes = " i8" if problem.input is Dtype.i8 else f" {COUNTED_CODES[problem.quantization.codes].value}" if problem.quantization else ""
    return problem.weights.value + fused + codes


def own_kernel(problem: GroupedGemmProblem, config: XeConfig, device: DeviceRecord) -> Kernel:
    """moe_xe's own kernel, with the instructions counted for it. Raises KeyError for a shape that was not counted."""
    counted = counted_instructions()[device.architecture.counted][variant_of(problem)]

    def code(rows: int, columns: int) -> Code:
        entry = counted[f"{rows}x{columns}"]
        return Code(entry["dpas"] + entry["messages"] + entry["other"], entry["tile"])

    return Kernel(config, code, weight_bytes=problem.weight_bytes)


def predict(problem: GroupedGemmProblem, tokens_per_expert: Sequence[Rows], kernel: Kernel, device: DeviceRecord,
            launches: int = 1, even: bool = False) -> Prediction:
    """The time of one grouped GEMM. tokens_per_expert: an expert's rows, or its rows of each rank (model/schedule.py).

    launches: kernels in whose wake it runs, itself included; 0 for its time on the device alone. even: as if its work could be
    shared out evenly, a lower bound that needs no queue. Raises ValueError for a device that is no Xe GPU.
    """
    if device.architecture is None:
        raise ValueError(f"device must be an Xe GPU with an architecture, got {device.name}")
    config, size = kernel.config, problem.input.size
    weight_bytes = kernel.weight_bytes or size
    column_tiles, row_tiles = -(-problem.n // config.tile_width), Counter[int]()
    for expert_rows, experts in Counter(tokens_per_expert).items():
        for height in cut_of(expert_rows, config):
            row_tiles[height] += experts
    num_parts = row_tiles.total() * column_tiles * config.splits
    residents = min(kernel.groups_per_core, max(-(-num_parts // device.xe_cores), 1))
    costs = {height: tile_cost(problem, kernel, device, index, residents) for index, height in enumerate(config.heights)}

    def share(part: str) -> float:
        total = sum(getattr(costs[height], part) * number for height, number in row_tiles.items())
        return total * column_tiles * config.splits / device.xe_cores

    rows, mean = sum(map(num_rows, tokens_per_expert)), share("seconds")
    queue = (costs[height].seconds for height in _tile_heights(tokens_per_expert, problem.n, config))
    makespan = mean if even else _makespan(queue, device.xe_cores, config.schedule)
    l2_bytes = problem.k * (rows * size * column_tiles + row_tiles.total() * problem.n * weight_bytes)
    l2_bytes += 2 * config.splits * column_tiles * sum(_part_bytes(config, height) * number for height, number in row_tiles.items())
    readers = max(min(device.xe_cores, num_parts), 1)
    parts = {part: share(part) for part in ("matrix", "issue", "L1", "latency")}
    parts["L2"] = l2_bytes / (device.architecture.l2_rate * device.clock * 1e9 * readers)
    moved = memory_bytes(problem, tokens_per_expert, config, weight_bytes, device.l2_bytes)
    parts["memory"] = moved / (device.bandwidth * 1e9)
    parts["launch"] = launches * LAUNCH_SECONDS
    seconds = overlapped(makespan, parts["L2"], parts["memory"]) + parts["launch"]
    return _prediction(problem, tokens_per_expert, device, seconds, parts, makespan - mean, weight_bytes)


def predict_cpu(problem: GroupedGemmProblem, tokens_per_expert: Sequence[Rows], config: CpuConfig,
                device: DeviceRecord) -> Prediction:
    """The same for the SYCL CPU device: its multiply-add units and its memory, both as measured (bench/roofline.py)."""
    core_rate = device.peak(problem.input) / device.xe_cores

    def tile_seconds(tile: Tile) -> float:
        columns = min(config.tile_width, problem.n - tile.column)
        return 2 * config.computed_rows(tile.height, tile.rows) * columns * problem.k / config.splits / core_rate

    work = 2 * sum(map(num_rows, tokens_per_expert)) * problem.n * problem.k / device.peak(problem.input)
    queue = map(tile_seconds, tiles(tokens_per_expert, problem.n, config))
    makespan = _makespan(queue, device.xe_cores, config.schedule)
    num_bytes = memory_bytes(problem, tokens_per_expert, config, problem.weight_bytes, device.l2_bytes)
    parts = {"multiply-add": work, "memory": num_bytes / (device.bandwidth * 1e9)}
    seconds = overlapped(makespan, parts["memory"])
    return _prediction(problem, tokens_per_expert, device, seconds, parts, makespan - work, problem.weight_bytes)


def _prediction(problem: GroupedGemmProblem, tokens_per_expert: Sequence[Rows], device: DeviceRecord, seconds: float,
                parts: dict[str, float], tail: float, weight_bytes: float) -> Prediction:
    counts = list(map(num_rows, tokens_per_expert))
    rows, active = sum(counts), sum(count > 0 for count in counts)
    flops = 2 * rows * problem.n * problem.k
    least_bytes = (rows * (problem.k * problem.input.size + problem.out_n * problem.output.size) +
                   active * problem.n * problem.k * weight_bytes)
    return Prediction(seconds, parts, tail, flops, device.roofline_seconds(flops, least_bytes, problem.input, problem.tf32))


def _tile_heights(tokens_per_expert: Sequence[Rows], n: int, config: TileConfig) -> Iterator[int]:
    """Of the queue's tiles in their order: all that the model needs of schedule.tiles, in a tenth of the time."""
    columns = -(-n // config.tile_width)
    for expert_rows in sorted(tokens_per_expert, key=lambda rows: -num_rows(rows).bit_length()):
        row_tiles = cut_of(expert_rows, config)
        for first in range(0, len(row_tiles), config.raster_group):
            yield from (height for height in row_tiles[first:first + config.raster_group] * columns for _ in range(config.splits))


def _makespan(seconds: Iterable[float], cores: int, schedule: Schedule) -> float:
    """When the last of the cores is done with a queue of tiles that take so long."""
    busy = [0.0] * cores
    if schedule is Schedule.static:
        for number, tile in enumerate(seconds):
            busy[number % cores] += tile
    else:
        for tile in seconds:
            heapq.heapreplace(busy, busy[0] + tile)
    return max(busy)


def _part_bytes(config: TileConfig, height: int) -> int:
    """Of a tile's sums that go through memory, for each part of its K."""
    return height * config.tile_width * Dtype.f32.size if config.splits > 1 else 0


@dataclass(frozen=True)
class TileCost:
    """Seconds that one tile takes of its Xe core, by what keeps the core busy; seconds: all of it."""
    matrix: float
    issue: float
    L1: float
    latency: float
    seconds: float


def tile_cost(problem: GroupedGemmProblem, kernel: Kernel, device: DeviceRecord, index: int, residents: int = 1) -> TileCost:
    """Of the tile shape at this index of the heights, or of a part of its K, where `residents` work-groups share the core."""
    arch, config, clock = device.architecture, kernel.config, device.clock * 1e9
    rows, columns, sub_groups = config.sub_group_rows[index], config.sub_group_columns[index], config.sub_groups[index]
    code, weight_share = kernel.code(rows, columns), (kernel.weight_bytes or problem.input.size) / problem.input.size
    steps = -(-problem.k * problem.input.size // (STEP_BYTES * config.splits))
    threads = -(-sub_groups * residents // arch.engines)            # of an engine
    # a thread waits for its own loads; the others of its engine multiply meanwhile
    step_dpas = rows * columns / STEP_DPAS_SUMS * arch.dpas_cycles
    matrix = steps * max(threads * step_dpas, step_dpas + arch.load_latency) / MATRIX_EFFICIENCY / clock
    issue = steps * threads * code.step / clock
    l1 = steps * sub_groups * residents * (rows + columns * weight_share) * STEP_BYTES / arch.l1_rate / clock
    # a step's lines are asked for prefetch_distance steps ahead
    latency = steps * arch.memory_latency / max(config.prefetch_distance, 1)
    ends = arch.memory_latency + threads * code.tile / clock        # first loads, epilogue
    if config.splits > 1:       # sums are stored and counted; the last part of a tile loads all
        ends += 2 * arch.memory_latency + (1 + config.splits) * _part_bytes(config, config.heights[index]) / (arch.l2_rate * clock)
    parts = (matrix, issue, l1, latency)
    return TileCost(*(part / residents for part in (*parts[:3], latency + ends, overlapped(*parts) + ends)))


def memory_bytes(problem: GroupedGemmProblem, tokens_per_expert: Sequence[Rows], config: TileConfig, weight_bytes: float,
                 l2_bytes: int) -> float:
    """What memory moves. An expert's weights are read again for each group of row tiles, unless L2 holds them meanwhile; a
    group's tokens for each column of tiles, likewise (L2 in order of last use: what does not fit is gone when it is due)."""
    total = 0.0
    column_tiles = -(-problem.n // config.tile_width)
    weights, column = problem.n * problem.k * weight_bytes, config.tile_width * problem.k * weight_bytes
    for expert_rows, experts in Counter(tokens_per_expert).items():
        count = num_rows(expert_rows)
        if count <= 0:
            continue
        row_tiles = cut_of(expert_rows, config)
        groups = -(-len(row_tiles) // config.raster_group)
        tokens = count * problem.k * problem.input.size
        group_tokens = min(sum(row_tiles[:config.raster_group]), count) * problem.k * problem.input.size
        moved = weights * (1 if weights + group_tokens <= l2_bytes else groups)
        moved += tokens * (1 if group_tokens + column <= l2_bytes else column_tiles)
        total += experts * (moved + count * problem.out_n * problem.output.size)
    return total
