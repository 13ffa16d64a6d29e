"""The weights' gradient, ``d[e] = left[rows of e]^T @ right[rows of e]``: what its kernel is compiled for, and its tiles."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ..gemm.config import (RECORD_BYTES, TILE_INPUTS, TILE_SIDE, VECTOR_DWORDS, _round_up, check_cpu_kernel, check_fields, check_prefetch_distance,
                           elements_per_step)
from ..problem import Dtype, RowsFormat


class Gathered(str, Enum):
    """Which operand's rows are gathered."""
    none = "none"
    left = "left"
    right = "right"


@dataclass(frozen=True)
class OuterProblem:
    """p, q: columns of left and of right. slots: row r of the gathered operand is row_indices[r] // slots. accumulate: d is
    added to instead of overwritten. ranks: as in GroupedGemmProblem."""
    p: int
    q: int
    input: Dtype
    output: Dtype
    rows_format: RowsFormat = RowsFormat.counts
    rows_bits: int = 32
    gathered: Gathered = Gathered.none
    slots: int = 1
    accumulate: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        types = self.input.value if self.input is self.output else f"{self.input.value}->{self.output.value}"
        gathered = "" if self.gathered is Gathered.none else f" {self.gathered.value} gathered"
        of_ranks = f" of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{types} P={self.p} Q={self.q}{gathered}{' accumulated' if self.accumulate else ''}{of_ranks}"


@dataclass(frozen=True)
class OuterOperands:
    """Where the operands lie: base addresses in bytes, strides in elements."""
    left: int
    right: int
    d: int
    total_rows: int
    left_rows: int
    right_rows: int
    num_experts: int
    left_stride: int
    right_stride: int
    d_stride: int
    d_expert_stride: int


@dataclass(frozen=True)
class OuterConfig(ABC):
    """tile_rows x tile_columns: of a work-group's part of d. splits: tiles that share an expert's rows out."""
    tile_rows: int
    tile_columns: int
    splits: int

    entry_bytes: ClassVar[int] = RECORD_BYTES      # of an expert in the list of tiles

    def __post_init__(self):
        check_fields(self)
        for name in ("tile_rows", "tile_columns", "splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.tile_rows} x {self.tile_columns}, {self._details()}, {self.splits} splits)"

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

    def scratch_bytes(self, problem: OuterProblem) -> int:
        """Global memory that one work-group needs for itself."""
        return 0

    def most_records(self, problem: OuterProblem, total_rows: int, num_experts: int) -> int:
        """Entries of the list of tiles: one for all tiles of an expert."""
        return num_experts


@dataclass(frozen=True)
class OuterSubGroupConfig(OuterConfig):
    """Tiles shared out to sub-groups of 16 lanes, sub_group_rows x sub_group_columns each."""
    sub_group_rows: int
    sub_group_columns: int

    def __post_init__(self):
        super().__post_init__()
        if min(self.sub_group_rows, self.sub_group_columns) < 1 or self.tile_rows % self.sub_group_rows or self.tile_columns % self.sub_group_columns:
            raise ValueError(f"tile_rows and tile_columns must be multiples of the sub-group's, got {self}")

    def _details(self) -> str:
        return f"sub-groups {self.sub_group_rows}x{self.sub_group_columns}"

    @property
    def work_group_size(self) -> int:
        return 16 * (self.tile_rows // self.sub_group_rows) * (self.tile_columns // self.sub_group_columns)


@dataclass(frozen=True)
class OuterXeConfig(OuterSubGroupConfig):
    """dpas and 2D block loads. prefetch_distance: steps of 32 rows."""
    prefetch_distance: int

    def __post_init__(self):
        super().__post_init__()
        check_prefetch_distance(self)

    def _details(self) -> str:
        return f"{super()._details()}, prefetch {self.prefetch_distance}"


@dataclass(frozen=True)
class OuterGenericConfig(OuterSubGroupConfig):
    """fp32 FMA and plain loads: any SYCL GPU, any alignment, exact float32."""


@dataclass(frozen=True)
class OuterCpuConfig(OuterConfig):
    """One work-item a work-group, explicit vectors. isa, micro_rows, micro_columns: as in CpuConfig. row_block: sorted rows
    that are packed at once."""
    isa: str
    micro_rows: int
    micro_columns: int
    row_block: int

    def __post_init__(self):
        super().__post_init__()
        check_cpu_kernel(self)
        unit = 2 * TILE_SIDE if self.isa in TILE_INPUTS else 2
        if self.row_block < unit or self.row_block % unit:
            raise ValueError(f"row_block must be a multiple of {unit} rows with {self.isa}, got {self.row_block}")

    def _details(self) -> str:
        return f"{self.isa}, blocks {self.micro_rows}x{self.micro_columns}x{self.row_block}"

    @property
    def work_group_size(self) -> int:
        return 1

    def scratch_bytes(self, problem: OuterProblem) -> int:
        """Packed columns of left and of right, and sums kept between row blocks (cpu/outer.hpp asserts it)."""
        steps, width = self.row_block // elements_per_step(problem.input, self.isa), VECTOR_DWORDS[self.isa]
        tiled = self.isa in TILE_INPUTS
        left = -(-self.tile_rows // self.micro_rows) * _round_up(self.micro_rows, width) * (steps + (width if tiled else 1))
        columns = _round_up(self.tile_columns, self.micro_columns)
        right, sums = columns * (steps + 1), _round_up(self.tile_rows, TILE_SIDE if tiled else 1) * columns
        return 4 * _round_up(_round_up(left, 16) + _round_up(right, 16) + sums, 16)
