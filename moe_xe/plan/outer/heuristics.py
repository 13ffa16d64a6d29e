"""Every choice for the weights' gradient that is made without measuring, as pure functions."""
from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product

from ..gemm.config import TILE_INPUTS, _round_up
from ..gemm.heuristics import CPU_KERNELS, LANE_ACCESS, SURFACE_BASE_ALIGNMENT, Family, _surface_fits, isa_for
from ..problem import Dtype
from .config import Gathered, OuterConfig, OuterCpuConfig, OuterGenericConfig, OuterOperands, OuterProblem, OuterXeConfig


def outer_fits_block_messages(problem: OuterProblem, operands: OuterOperands) -> bool:
    """True where the operands are what sycl_kernels/include/moe_xe/xe/outer.hpp asks for."""
    size, out_size = problem.input.size, problem.output.size
    swapped, gathers = problem.gathered is Gathered.right, problem.gathered is not Gathered.none
    left = operands.left, problem.p, operands.left_rows, operands.left_stride
    right = operands.right, problem.q, operands.right_rows, operands.right_stride
    (a, a_columns, a_rows, a_stride), (b, b_columns, b_rows, b_stride) = (right, left) if swapped else (left, right)
    d_pitch = operands.d_stride * out_size
    expert_pitch = operands.d_expert_stride * out_size if operands.num_experts > 1 else 0
    if swapped:                         # each lane stores its own row of d
        d_fits = all(value % LANE_ACCESS == 0 for value in (operands.d, d_pitch, expert_pitch))
    else:
        d_fits = (_every_second_row_fits(operands.d, problem.q * out_size, problem.p, d_pitch) and
                  expert_pitch % SURFACE_BASE_ALIGNMENT == 0)
    a_fits = _surface_fits if gathers else _every_second_row_fits
    return (d_fits and not (gathers and a_columns % 16) and a_fits(a, a_columns * size, a_rows, a_stride * size) and
            _surface_fits(b, b_columns * size, b_rows, b_stride * size))


def _every_second_row_fits(base: int, width: int, height: int, pitch: int) -> bool:
    """Whether even and odd rows can be surfaces of their own."""
    return _surface_fits(base, width, height, 2 * pitch) and pitch % SURFACE_BASE_ALIGNMENT == 0 and width <= pitch


def choose_outer_family(problem: OuterProblem, operands: OuterOperands, is_cpu: bool, has_dpas: bool) -> Family:
    """float32 operands are multiplied exactly, so not by dpas."""
    if is_cpu:
        return Family.cpu
    xe = has_dpas and problem.input is not Dtype.f32 and outer_fits_block_messages(problem, operands)
    return Family.xe if xe else Family.generic


TILES_A_CORE = 4         # below, the tail of the queue leaves cores idle
MAX_SPLITS = 16
MAX_PARTS_BYTES = 1 << 28
MIN_SPLIT_ROWS = 256     # fewer cost less than summing one more part


def can_split(problem: OuterProblem, operands: OuterOperands) -> bool:
    """Whether d may be the sum of parts: it is overwritten, and its rows are equally spaced across experts."""
    return not problem.accumulate and (operands.num_experts == 1 or operands.d_expert_stride == problem.p * operands.d_stride)


def choose_splits(problem: OuterProblem, operands: OuterOperands, tile_rows: int, tile_columns: int, cores: int) -> int:
    """So many that every core has some tiles, where that is worth the parts' memory."""
    tiles = operands.num_experts * -(-problem.p // tile_rows) * -(-problem.q // tile_columns)
    if not can_split(problem, operands):
        return 1
    affordable = (MAX_PARTS_BYTES - 1) // (operands.num_experts * problem.p * problem.q * Dtype.f32.size)
    return max(1, min(-(-TILES_A_CORE * cores // tiles), MAX_SPLITS, affordable, operands.total_rows // MIN_SPLIT_ROWS))


XE_SUB_GROUP = (32, 64)  # of dpas' left operand (two moves a column) and of its right one
XE_ENGINES = 8           # of an Xe core, each of which runs sub-groups of its own


def xe_tile(left_columns: int, right_columns: int) -> tuple[int, int]:
    """The tile, in columns of dpas' operands, that takes least time; of equals, the one that pads least, then the largest.

    A tile takes as long as the engine with most sub-groups; fewer than two an engine do not hide loads.
    """
    rows, columns = XE_SUB_GROUP
    shapes = [(r, c, r // rows * (c // columns)) for r, c in product((256, 128, 64, 32), (256, 192, 128, 64))]

    def cost(shape: tuple[int, int, int]) -> tuple[int, int, int]:
        r, c, sub_groups = shape
        tiles = -(-left_columns // r) * -(-right_columns // c)
        return tiles * max(-(-sub_groups // XE_ENGINES), 2), tiles * r * c, -r * c

    return min((shape for shape in shapes if 4 <= shape[2] <= 32), key=cost)[:2]


@functools.lru_cache(maxsize=1024)
def xe_outer_config(problem: OuterProblem) -> OuterXeConfig:
    """A gathered operand is dpas' left one: with `right` gathered the product is d^T."""
    swapped = problem.gathered is Gathered.right
    tile = xe_tile(problem.q, problem.p) if swapped else xe_tile(problem.p, problem.q)
    (tile_rows, tile_columns), (rows, columns) = (tile[::-1], XE_SUB_GROUP[::-1]) if swapped else (tile, XE_SUB_GROUP)
    return OuterXeConfig(tile_rows, tile_columns, splits=1, sub_group_rows=rows, sub_group_columns=columns, prefetch_distance=3)


@functools.lru_cache(maxsize=1024)
def generic_outer_config(problem: OuterProblem) -> OuterGenericConfig:
    rows, columns = min(32, 1 << (problem.p - 1).bit_length()), 16 if problem.q <= 16 else 32
    return OuterGenericConfig(min(256, _round_up(problem.p, rows)), min(128, _round_up(problem.q, columns)), splits=1,
                              sub_group_rows=rows, sub_group_columns=columns)


CPU_TILES = ((336, 384), (168, 192))     # larger ones pack less, smaller ones share the work out better
AMX_TILES = ((192, 384), (192, 192))
CPU_TILES_A_CORE = 8
CPU_ROW_BLOCK, AMX_ROW_BLOCK = 128, 256


def cpu_tile(problem: OuterProblem, isa: str, num_experts: int, cores: int) -> tuple[int, int]:
    """The largest tile of which there are enough."""
    tiles = AMX_TILES if isa in TILE_INPUTS else CPU_TILES

    def enough(tile: tuple[int, int]) -> bool:
        return num_experts * -(-problem.p // tile[0]) * -(-problem.q // tile[1]) >= CPU_TILES_A_CORE * cores

    return next(filter(enough, tiles), tiles[-1])


@functools.lru_cache(maxsize=1024)
def cpu_outer_config(isa: str, tile: tuple[int, int] = CPU_TILES[0]) -> OuterCpuConfig:
    """isa: the CPU's vector instructions."""
    micro_rows, micro_columns = CPU_KERNELS[isa][:2]
    return OuterCpuConfig(*tile, splits=1, isa=isa, micro_rows=micro_rows, micro_columns=micro_columns,
                          row_block=AMX_ROW_BLOCK if isa in TILE_INPUTS else CPU_ROW_BLOCK)


def choose_outer_config(problem: OuterProblem, operands: OuterOperands, family: Family, cores: int,
                        isa: str | None = None) -> OuterConfig:
    """The configuration of one launch; `isa` names the CPU's vector instructions (family cpu)."""
    if family is Family.cpu:
        isa = isa_for(problem.input, isa or "baseline")
        config = cpu_outer_config(isa, cpu_tile(problem, isa, operands.num_experts, cores))
    else:
        config = xe_outer_config(problem) if family is Family.xe else generic_outer_config(problem)
    splits = choose_splits(problem, operands, config.tile_rows, config.tile_columns, cores)
    return config if splits == 1 else replace(config, splits=splits)
