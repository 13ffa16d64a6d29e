"""The weights' gradient, ``d[e] = left[rows of e]^T @ right[rows of e]``: what its kernel is compiled for, and its tiles."""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .config import VECTOR_DWORDS, _round_up
from .problem import Dtype, RowsFormat


class Gathered(str, Enum):
    """Which operand's rows are gathered."""
    none = "none"
    left = "left"
    right = "right"


@dataclass(frozen=True)
class OuterProblem:
    """p, q: columns of left and of right. slots: row r of the gathered operand is row_indices[r] // slots. accumulate: d is
    added to instead of overwritten."""
    p: int
    q: int
    input: Dtype
    output: Dtype
    rows_format: RowsFormat = RowsFormat.counts
    rows_bits: int = 32
    gathered: Gathered = Gathered.none
    slots: int = 1
    accumulate: bool = False


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
class OuterConfig:
    """tile_rows x tile_columns: of a work-group's part of d. splits: tiles that share an expert's rows out."""
    tile_rows: int
    tile_columns: int
    splits: int

    @property
    def work_group_size(self) -> int:
        raise NotImplementedError

    def scratch_bytes(self, problem: OuterProblem) -> int:
        """Global memory that one work-group needs for itself."""
        return 0


@dataclass(frozen=True)
class OuterSubGroupConfig(OuterConfig):
    """Tiles shared out to sub-groups of 16 lanes, sub_group_rows x sub_group_columns each."""
    sub_group_rows: int
    sub_group_columns: int

    def __post_init__(self):
        if self.tile_rows % self.sub_group_rows or self.tile_columns % self.sub_group_columns:
            raise ValueError(f"tile_rows and tile_columns must be multiples of the sub-group's, got {self}")

    @property
    def work_group_size(self) -> int:
        return 16 * (self.tile_rows // self.sub_group_rows) * (self.tile_columns // self.sub_group_columns)


@dataclass(frozen=True)
class OuterXeConfig(OuterSubGroupConfig):
    """dpas and 2D block loads. prefetch_distance: steps of 32 rows."""
    prefetch_distance: int


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

    @property
    def work_group_size(self) -> int:
        return 1

    def scratch_bytes(self, problem: OuterProblem) -> int:
        """Packed columns of left and of right, and sums kept between row blocks (outer_cpu.hpp asserts it)."""
        steps = self.row_block // (2 if problem.input is Dtype.bf16 and self.isa == "avx512_bf16" else 1)
        left = -(-self.tile_rows // self.micro_rows) * (steps + 1) * _round_up(self.micro_rows, VECTOR_DWORDS[self.isa])
        columns = _round_up(self.tile_columns, self.micro_columns)
        right, sums = columns * (steps + 1), self.tile_rows * columns
        return 4 * _round_up(_round_up(left, 16) + _round_up(right, 16) + sums, 16)
