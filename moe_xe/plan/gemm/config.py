"""How a problem is computed: tile shapes, schedule and the inner loop's constants, one class per device family."""
from __future__ import annotations

import functools
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from enum import Enum

from ..problem import Dtype, GroupedGemmProblem

HOST_ONLY = {"host_only": True}     # marks fields that are no constants of the kernel
MOST_HEIGHTS = 16                    # as a tile's record has room for (variant_bits in sycl_kernels/include/moe_xe/queue/tile_queue.hpp)
MOST_PARTS = 1 << 10                 # tiles x splits, likewise (number_bit there)
LEAST_PART = 256                     # elements of K in a part, at least
RECORD_BYTES = 16                    # of sycl_kernels/include/moe_xe/queue/runs.hpp
MOST = 1 << 16                      # of any number, so that sums and products of a few stay within the kernels' integers


class Schedule(str, Enum):
    """dynamic: work-groups fetch tiles with an atomic; static: work-group g takes tiles g, g + groups, ..."""
    dynamic = "dynamic"
    static = "static"


def check_prefetch_distance(config) -> None:
    """Raises ValueError for more steps than an immediate offset of a block message reaches."""
    if not 0 <= config.prefetch_distance <= 15:
        raise ValueError(f"prefetch_distance must be from 0 to 15, got {config.prefetch_distance}")


@functools.cache
def field_types(kind: type) -> dict[str, object]:
    """The types of a configuration's fields, by name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def check_fields(config) -> None:
    """Raises TypeError for a field of another type than its own, ValueError for a number that no kernel takes; names it."""
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        is_tuple = hint == tuple[int, ...]
        if type(value) is not (tuple if is_tuple else hint) or (is_tuple and any(type(item) is not int for item in value)):
            raise TypeError(f"{name} must be {'a tuple of int' if is_tuple else f'of type {hint.__name__}'}, got {value!r}")
        if any(isinstance(item, int) and not 0 <= item <= MOST for item in (value if is_tuple else (value,))):
            raise ValueError(f"{name} must be from 0 to {MOST}, got {value}")


@dataclass(frozen=True)
class TileConfig(ABC):
    """The tile queue's constants (see sycl_kernels/include/moe_xe/queue/tile_queue.hpp).

    heights: rows of the tile shapes, falling. tile_width: columns of every tile. raster_group: row tiles that share a
    column of weights before the next column. min_fill_eighths: a rest of rows takes a height if it fills this share.
    splits: work-groups that share a tile's K out, for fewer tiles than cores (queue/split_k.hpp).
    """
    heights: tuple[int, ...]
    tile_width: int
    raster_group: int
    min_fill_eighths: int
    schedule: Schedule
    splits: int = field(default=1, kw_only=True)

    def __post_init__(self):
        check_fields(self)
        if not self.heights or list(self.heights) != sorted(set(self.heights), reverse=True) or self.heights[-1] < 1:
            raise ValueError(f"heights must be positive and strictly falling, got {self.heights}")
        if len(self.heights) > MOST_HEIGHTS:
            raise ValueError(f"there must be at most {MOST_HEIGHTS} heights, got {self.heights}")
        for name, low, high in (("tile_width", 1, None), ("raster_group", 1, None), ("min_fill_eighths", 1, 8), ("splits", 1, None)):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise ValueError(f"{name} must be at least {low}" + (f" and at most {high}" if high else "") + f", got {value}")

    def __str__(self) -> str:
        splits = f", {self.splits} splits" if self.splits > 1 else ""
        return f"{type(self).__name__}({'/'.join(map(str, self.heights))} x {self.tile_width}, {self._details()}{splits}, {self.schedule.value})"

    @abstractmethod
    def _details(self) -> str:
        """What a kind of its own adds to the tiles, in short."""

    @property
    @abstractmethod
    def work_group_size(self) -> int:
        """Work-items of one work-group."""

    def work_groups(self, cores: int) -> int:
        """Work-groups of a launch on so many cores."""
        return cores

    def computed_rows(self, height: int, rows: int) -> int:
        """Rows that a tile of this height computes when only `rows` of them exist."""
        return height

    def scratch_bytes(self, problem: GroupedGemmProblem) -> int:
        """Global memory that one work-group needs for itself."""
        return 0

    @property
    def part_floats(self) -> int:
        """Sums of a tile's part of K in memory."""
        return self.heights[0] * self.tile_width

    @property
    def entry_bytes(self) -> int:
        """Of a tile in the list: its record; where K is split, also how many parts are done, and their sums."""
        return RECORD_BYTES if self.splits == 1 else 2 * RECORD_BYTES + self.splits * _round_up(4 * self.part_floats, RECORD_BYTES)

    def most_records(self, problem: GroupedGemmProblem, total_rows: int, num_experts: int) -> int:
        """Entries of the list of tiles: at least as many as there are tiles, however the rows are spread over the experts."""
        of_rest = 1 + sum(-(-taller // height) for taller, height in zip(self.heights, self.heights[1:]))
        runs = min(num_experts * problem.ranks, total_rows)      # of rows
        row_tiles = min(total_rows // self.heights[-1] + runs, total_rows // self.heights[0] + runs * of_rest)
        return row_tiles * -(-problem.n // self.tile_width)


@dataclass(frozen=True)
class SubGroupConfig(TileConfig):
    """Tiles that are shared out to sub-groups of 16 lanes.

    sub_group_rows, sub_group_columns: one sub-group's part of the tile, for each height.
    """
    sub_group_rows: tuple[int, ...]
    sub_group_columns: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        if not len(self.heights) == len(self.sub_group_rows) == len(self.sub_group_columns):
            raise ValueError(f"sub_group_rows {self.sub_group_rows} and sub_group_columns {self.sub_group_columns} need one "
                             f"entry for each of the heights {self.heights}")
        for name in ("sub_group_rows", "sub_group_columns"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1 each, got {getattr(self, name)}")
        if max(self.sub_groups) > self.sub_groups[0] or min(self.sub_groups) < 1:
            raise ValueError(f"every height must use at least one sub-group and no more than the first, got {self.sub_groups} for {self}")

    @property
    def sub_groups(self) -> tuple[int, ...]:
        """Sub-groups used, for each height; the others of the work-group have no part of such a tile."""
        return tuple((h // r) * (self.tile_width // c) for h, r, c in zip(self.heights, self.sub_group_rows, self.sub_group_columns))

    def _details(self) -> str:
        return "sub-groups " + "/".join(f"{rows}x{columns}" for rows, columns in zip(self.sub_group_rows, self.sub_group_columns))

    @property
    def work_group_size(self) -> int:
        return self.sub_groups[0] * 16


@dataclass(frozen=True)
class XeConfig(SubGroupConfig):
    """dpas and 2D block loads. prefetch_distance: steps of 64 bytes along K, at most 15 (an immediate offset).

    grf_size: registers of a hardware thread, 256, or 128 and twice as many threads.
    """
    prefetch_distance: int
    grf_size: int = field(default=256, metadata=HOST_ONLY)

    def __post_init__(self):
        super().__post_init__()
        if self.grf_size not in (128, 256):
            raise ValueError(f"grf_size must be 128 or 256, got {self.grf_size}")
        check_prefetch_distance(self)

    def _details(self) -> str:
        return f"{super()._details()}, prefetch {self.prefetch_distance}, {self.grf_size} registers"


@dataclass(frozen=True)
class GenericConfig(SubGroupConfig):
    """fp32 FMA and plain loads: any SYCL GPU, any alignment."""


@dataclass(frozen=True)
class CpuConfig(TileConfig):
    """One work-item a work-group, explicit vectors (cpu/mainloop.hpp).

    isa: the CPU's vector instructions, see types.hpp. micro_rows x micro_columns: accumulators of a packed block.
    k_block: elements of K that a panel of weights is packed for at once. unpacked_rows: tiles of at most so many rows
    read [N, K] weights in place, dot_rows of them at a time. prefetch_columns: how many columns of weights ahead panels are fetched,
    prefetch_bytes: and those that are read in place. threads: work-groups of a launch; 0 for one a core.
    """
    isa: str
    micro_rows: int
    micro_columns: int
    k_block: int
    unpacked_rows: int
    dot_rows: int
    prefetch_columns: int
    prefetch_bytes: int = 4096
    threads: int = field(default=0, metadata=HOST_ONLY)

    def __post_init__(self):
        super().__post_init__()
        check_cpu_kernel(self)
        step = VECTOR_DWORDS[self.isa] * 2      # of a vector of pairs
        if self.k_block < step or self.k_block % step:
            raise ValueError(f"k_block must be a multiple of {step} with {self.isa}, got {self.k_block}")
        if self.unpacked_rows < 1:
            raise ValueError(f"unpacked_rows must be at least 1, got {self.unpacked_rows}")
        if not 1 <= self.dot_rows <= MOST_DOT_ROWS:
            raise ValueError(f"dot_rows must be from 1 to {MOST_DOT_ROWS}, got {self.dot_rows}")

    def _details(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return (f"{self.isa}, blocks {self.micro_rows}x{self.micro_columns}x{self.k_block}, in place up to {self.unpacked_rows} rows, "
                f"{self.dot_rows} at a time, {self.prefetch_columns} columns ahead{threads}")

    @property
    def work_group_size(self) -> int:
        return 1

    def work_groups(self, cores: int) -> int:
        return self.threads or cores

    def computed_rows(self, height: int, rows: int) -> int:
        return rows

    @property
    def part_floats(self) -> int:
        columns = 2 * VECTOR_DWORDS[self.isa]
        return self.heights[0] * (_round_up(self.tile_width, columns) + columns)

    def scratch_bytes(self, problem: GroupedGemmProblem) -> int:
        """Packed rows of A, one packed panel of weights, and sums kept between blocks of K (cpu/mainloop.hpp asserts it)."""
        tiled, padded_k = self.isa in TILE_INPUTS, _round_up(problem.k, 8 * VECTOR_DWORDS[self.isa])
        step, height = elements_per_step(problem.input, self.isa), _round_up(self.heights[0], TILE_SIDE if tiled else 1)
        packed_a = height * (padded_k // step + 16)
        if problem.quantization:      # integers and units of a few tokens, and sums of these
            packed_a = max(packed_a, min(self.unpacked_rows, self.heights[0]) * (2 * padded_k + 4 * VECTOR_DWORDS[self.isa] + 16))
        panel = (min(self.k_block, padded_k) // step + (16 if tiled else 0)) * self.micro_columns
        sums = height * _round_up(self.tile_width, self.micro_columns) if problem.k > self.k_block else 0
        return 4 * (_round_up(packed_a, 16) + _round_up(panel, 16) + _round_up(sums, 16))


MOST_DOT_ROWS = 8      # more fill no registers, and each is code of its own
# dwords of a vector register, by the names of types.hpp's Isa
VECTOR_DWORDS = {"amx_fp16": 16, "amx": 16, "avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}
VECTOR_REGISTERS = {"amx_fp16": 64, "amx": 64, "avx512_bf16": 32, "avx512": 32, "avx2": 16, "baseline": 16}    # of AMX: four tiles of sums
TILE_SIDE = 16         # of AMX: rows of a tile, and dwords of a row
TILE_INPUTS = {"amx_fp16": (Dtype.f16,), "amx": (Dtype.bf16, Dtype.i8)}       # what its tiles multiply


def isas_of(best: str) -> list[str]:
    """The vector instructions of a CPU whose newest are `best`, newest first."""
    known = list(VECTOR_DWORDS)
    return known[known.index(best):]


def tiles_multiply(isa: str, input: Dtype, dense: bool) -> bool:
    """Whether there are tiles for these operands: of fp16 with dense weights alone, as codes times scales may leave its range."""
    return input in TILE_INPUTS.get(isa, ()) and (dense or input is not Dtype.f16)


def elements_per_step(dtype: Dtype, isa: str) -> int:
    """Elements along K in a dword of packed operands (cpu/micro_kernel.hpp), which one instruction multiplies and adds to a sum."""
    if dtype is Dtype.i8:
        return {"amx": 4, "avx512_bf16": 4, "baseline": 1}.get(isa, 2)
    return 2 if dtype in TILE_INPUTS.get(isa, ()) or dtype is Dtype.bf16 and isa == "avx512_bf16" else 1


def check_cpu_kernel(config) -> None:
    """isa, micro_rows and micro_columns of a CPU kernel's configuration. Raises ValueError naming the one that does not fit."""
    if config.isa not in VECTOR_DWORDS:
        raise ValueError(f"isa must be one of {', '.join(VECTOR_DWORDS)}, got {config.isa!r}")
    width, registers = VECTOR_DWORDS[config.isa], VECTOR_REGISTERS[config.isa]
    if config.micro_columns < width or config.micro_columns % width:
        raise ValueError(f"micro_columns must be a multiple of {width} with {config.isa}, got {config.micro_columns}")
    if config.isa in TILE_INPUTS and (config.micro_rows, config.micro_columns) != (2 * TILE_SIDE, 2 * TILE_SIDE):
        raise ValueError(f"micro_rows x micro_columns must be 32 x 32 with {config.isa}, got {config.micro_rows} x {config.micro_columns}")
    if config.micro_rows < 1 or config.micro_rows * (config.micro_columns // width) > registers:
        raise ValueError(f"micro_rows x micro_columns must be sums in at most {registers} registers of {width} dwords, got "
                         f"{config.micro_rows} x {config.micro_columns}")


def num_entries(num_experts: int, ranks: int) -> int:
    """Records in front of the list of tiles: one for each expert, and for each of its runs where there are several."""
    return num_experts * (1 + ranks if ranks > 1 else 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
