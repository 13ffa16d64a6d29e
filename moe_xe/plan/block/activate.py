"""Kernels that pass over rows, the activations of training and rows to int8 codes: what they are compiled for, and how many work-groups."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..problem import Activation, Dtype

LANES = 16
MAX_SUB_GROUPS = 8                                # of a row, on a GPU
MAX_ROWS = 2**31 // (LANES * MAX_SUB_GROUPS)      # work-items are counted in int32
LANE_BYTES = 16                                   # of a lane's widest access
CPU_ROWS = 8                                      # of a work-group, at the least


@dataclass(frozen=True)
class ActivateProblem:
    """``hs = scale * act(z)``, ``dz = scale * g * act'(z)``, ``dscale = <g, act(z)>``; None or False: left out.

    row_size: columns of hs and g; z and dz have twice as many if the activation is gated. has_row_pairs: some
    rows are unused. columns: consecutive ones that a GPU's lane takes at once.
    """
    row_size: int
    activation: Activation
    z: Dtype
    g: Dtype | None = None
    dz: Dtype | None = None
    hs: Dtype | None = None
    dscale: bool = False
    has_row_scales: bool = False
    has_row_pairs: bool = False
    columns: int = 1


@dataclass(frozen=True)
class QuantizeRowsProblem:
    """Rows of row_size numbers to int8 codes with a scale each. columns: as above."""
    row_size: int
    input: Dtype
    columns: int = 1


def lane_columns(row_size: int, matrices: Iterable[tuple[int, int, Dtype]]) -> int:
    """How many columns all matrices (address, row stride in elements, type) have aligned in every row: 8, 4, 2 or 1."""
    matrices = list(matrices)
    for columns in (8, 4, 2):
        if row_size % columns == 0 and all(
                columns * dtype.size <= LANE_BYTES and address % (columns * dtype.size) == 0 and stride % columns == 0
                for address, stride, dtype in matrices):
            return columns
    return 1


def sub_groups(problem: ActivateProblem | QuantizeRowsProblem) -> int:
    """Sub-groups that share a row, on a GPU: each takes two vectors a lane, or more."""
    return min(-(-problem.row_size // (2 * LANES * problem.columns)), MAX_SUB_GROUPS)


def activate_groups(problem: ActivateProblem | QuantizeRowsProblem, rows: int, is_cpu: bool, cores: int) -> tuple[int, int]:
    """Work-groups and work-items in each: on a GPU a work-group has one row."""
    if is_cpu:
        return max(min(cores, rows // CPU_ROWS), 1), 1
    return rows, LANES * sub_groups(problem)
