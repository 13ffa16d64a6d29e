"""Why a configuration that somebody chose by hand, or long ago, cannot be used for a problem; found before anything is compiled."""
from __future__ import annotations

from collections.abc import Iterable

from .gemm.config import TILE_INPUTS, VECTOR_DWORDS, CpuConfig, GenericConfig, TileConfig, XeConfig, isas_of, tiles_multiply
from .gemm.heuristics import Family
from .gemm.splits import parts_reason
from .outer.config import Gathered, OuterConfig, OuterCpuConfig, OuterGenericConfig, OuterProblem, OuterXeConfig
from .problem import INT32_MAX, MAX_COLUMNS, Dtype, GroupedGemmProblem, WeightLayout
from .xe.rules import check_xe_config, most_sub_groups

__all__ = ["check_config", "check_outer_config", "check_outer_queue", "check_queue", "check_splits"]

LANES = 16
LARGEST_WORK_GROUP = 1024       # what every SYCL GPU takes
MOST_SPLITS = 64                # parts that the kernel of their sums takes
MOST_SUMS = 128                 # of a lane: half of the registers that a thread can have
MOST_REGISTERS = 240            # of a thread's 256, for sums and dpas' right operand
LARGEST_SCRATCH = 1 << 28       # bytes of a work-group
LARGEST_SCRATCHES = 1 << 34     # bytes of all work-groups, or of the list of tiles, that a configuration asks for
LARGEST_STACK = 1 << 17         # bytes of a work-item on the CPU device

_KINDS = {Family.xe: XeConfig, Family.cpu: CpuConfig, Family.generic: GenericConfig}
_OUTER_KINDS = {Family.xe: OuterXeConfig, Family.cpu: OuterCpuConfig, Family.generic: OuterGenericConfig}


def _refuse(config, reason: str) -> None:
    raise ValueError(f"config does not fit: {reason}; got {config}")


def check_config(problem: GroupedGemmProblem, config: TileConfig, family: Family, cpu_isa: str | None = None) -> None:
    """Raises ValueError naming the rule. cpu_isa: the best vector instructions of the CPU (family cpu)."""
    _check_kind(config, _KINDS[family], family)
    if isinstance(config, XeConfig):
        check_xe_config(problem, config)
    elif isinstance(config, CpuConfig):
        _check_isa(problem, config, cpu_isa)
        _check_cpu(problem, config)
    else:
        _check_generic(config, zip(config.sub_group_rows, config.sub_group_columns), 2 * LANES if problem.pairs else LANES)
        if any(height % rows for height, rows in zip(config.heights, config.sub_group_rows)):
            _refuse(config, "heights must be multiples of their sub_group_rows")
        if any(config.tile_width % columns for columns in config.sub_group_columns):
            _refuse(config, "tile_width must be a multiple of all sub_group_columns")


def check_queue(problem: GroupedGemmProblem, config: TileConfig, total_rows: int, num_experts: int, work_groups: int) -> None:
    """Raises ValueError for a queue whose numbers do not fit the kernel's integers, whoever chose the configuration."""
    _check_columns(N=problem.n, K=problem.k)
    columns, tiles = -(-problem.n // config.tile_width), config.most_records(problem, total_rows, num_experts)
    _check_numbers(config, num_experts * problem.ranks, tiles * config.splits, work_groups)
    if config.splits > 1:
        _check_parts(problem, config, tiles)
    _check_fits(config, "raster_group x columns of tiles", config.raster_group * columns)


def _check_parts(problem: GroupedGemmProblem, config: TileConfig, tiles: int) -> None:
    if reason := parts_reason(problem, config.splits, tiles):
        _refuse(config, reason)
    if tiles * config.entry_bytes > LARGEST_SCRATCHES:
        _refuse(config, f"sums of parts take {tiles * config.entry_bytes} bytes, at most {LARGEST_SCRATCHES} can be")


def check_outer_queue(problem: OuterProblem, config: OuterConfig, num_experts: int, work_groups: int) -> None:
    """The same for the weights' gradient."""
    _check_columns(P=problem.p, Q=problem.q)
    tiles = -(-problem.p // config.tile_rows) * -(-problem.q // config.tile_columns)
    _check_numbers(config, num_experts * problem.ranks, num_experts * tiles * config.splits, work_groups)
    if config.splits > 1:
        _check_fits(config, "rows of parts", num_experts * problem.p * config.splits)


def _check_columns(**columns: int) -> None:
    for name, number in columns.items():
        if number > MAX_COLUMNS:
            raise ValueError(f"{name} must be at most {MAX_COLUMNS}, got {number}")


def _check_numbers(config, counts: int, tiles: int, work_groups: int) -> None:
    """Numbers run on beyond the last tile, by as much as there are work-groups. counts: of experts, or of experts of ranks."""
    if counts > MAX_COLUMNS:
        raise ValueError(f"there must be at most {MAX_COLUMNS} experts of all ranks, got {counts}")
    _check_fits(config, "tiles", tiles + 2 * work_groups)


def _check_fits(config, what: str, number: int) -> None:
    if number > INT32_MAX:
        _refuse(config, f"{what} must stay below 2^31, but there can be {number}")


def check_splits(config: OuterConfig, can_split: bool) -> None:
    """can_split: whether an expert's d may be a sum of parts."""
    if config.splits > MOST_SPLITS:
        _refuse(config, f"splits must be at most {MOST_SPLITS}")
    if config.splits > 1 and not can_split:
        _refuse(config, "splits must be 1 where d is accumulated or its rows are not equally spaced")


def check_outer_config(problem: OuterProblem, config: OuterConfig, family: Family, cpu_isa: str | None = None) -> None:
    """The same for the weights' gradient."""
    _check_kind(config, _OUTER_KINDS[family], family)
    if isinstance(config, OuterCpuConfig):
        _check_isa(problem, config, cpu_isa)
        _check_scratch(problem, config)
    elif isinstance(config, OuterGenericConfig):
        _check_generic(config, [(config.sub_group_rows, config.sub_group_columns)], LANES)
    else:
        _check_outer_xe(problem, config)


def _check_kind(config, kind: type, family: Family) -> None:
    if not isinstance(config, kind):
        _refuse(config, f"the {family.value} kernel computes this call and needs a {kind.__name__}")


def _check_isa(problem: GroupedGemmProblem | OuterProblem, config: CpuConfig | OuterCpuConfig, cpu_isa: str | None) -> None:
    if cpu_isa is not None and config.isa not in isas_of(cpu_isa):
        _refuse(config, f"this CPU has no {config.isa}, its best is {cpu_isa}")
    inputs = TILE_INPUTS.get(config.isa, tuple(Dtype))
    if problem.input not in inputs:
        _refuse(config, f"{config.isa} multiplies {' and '.join(dtype.value for dtype in inputs)}, not {problem.input.value}")
    quantization = getattr(problem, "quantization", None)
    if quantization is not None and config.isa in TILE_INPUTS and not tiles_multiply(config.isa, problem.input, dense=False):
        _refuse(config, f"{config.isa} multiplies dense weights, not {quantization.codes.value}")


def _check_cpu(problem: GroupedGemmProblem, config: CpuConfig) -> None:
    columns = 2 * VECTOR_DWORDS[config.isa]
    if problem.pairs and (config.micro_columns % columns or config.tile_width % 2):
        _refuse(config, f"pairs of gate and up values need an even tile_width and micro_columns that are a multiple of {columns}")
    # of tiles that are not packed: rows and where they go, with [K, N] weights also their sums in two levels
    stack = config.unpacked_rows * (32 + (8 * config.tile_width if problem.weights is WeightLayout.ekn else 0))
    if stack > LARGEST_STACK:
        _refuse(config, f"unpacked_rows take {stack} bytes of stack, at most {LARGEST_STACK} can be")
    _check_scratch(problem, config)


def _check_scratch(problem: GroupedGemmProblem | OuterProblem, config: CpuConfig | OuterCpuConfig) -> None:
    scratch = config.scratch_bytes(problem)
    if scratch > LARGEST_SCRATCH:
        _refuse(config, f"packed blocks take {scratch} bytes of each work-group, at most {LARGEST_SCRATCH} can be")
    if scratch * config.work_groups(1) > LARGEST_SCRATCHES:
        _refuse(config, f"packed blocks of all threads take {scratch * config.work_groups(1)} bytes, at most {LARGEST_SCRATCHES} can be")


def _check_generic(config: GenericConfig | OuterGenericConfig, parts: Iterable[tuple[int, int]], multiple: int) -> None:
    """parts: rows and columns of sub-groups."""
    for rows, columns in parts:
        if columns % multiple:
            _refuse(config, f"sub_group_columns must be multiples of {multiple}")
        if rows * columns > MOST_SUMS * LANES:
            _refuse(config, f"sub-groups of {rows}x{columns} need {rows * columns // LANES} sums a lane, at most {MOST_SUMS} can be")
    if config.work_group_size > LARGEST_WORK_GROUP:
        _refuse(config, f"{config.work_group_size} work-items in a work-group, at most {LARGEST_WORK_GROUP} can be")


def _check_outer_xe(problem: OuterProblem, config: OuterXeConfig) -> None:
    """What sycl_kernels/include/moe_xe/xe/outer.hpp asserts."""
    swapped = problem.gathered is Gathered.right
    parts, tile = (config.sub_group_rows, config.sub_group_columns), (config.tile_rows, config.tile_columns)
    (left, right), sides = (parts[::-1], tile[::-1]) if swapped else (parts, tile)
    if left % 16 or right % 32:
        _refuse(config, "sub-groups must be multiples of 16 columns of dpas' left operand and of 32 of its right one "
                        f"({'right and left' if swapped else 'left and right'} of the product)")
    registers = left * right // LANES + right
    if registers > MOST_REGISTERS:
        _refuse(config, f"sums and operands of a sub-group take {registers} registers, at most {MOST_REGISTERS} can be")
    sub_groups, most = config.work_group_size // LANES, most_sub_groups(None)
    if sub_groups > most:
        _refuse(config, f"{sub_groups} sub-groups, an Xe core has {most}")
    for columns in sides[1:] if problem.gathered is not Gathered.none else sides:
        lines = columns // 32
        messages = max(lines // sub_groups, 1)
        if columns % 32 or lines % messages or lines // messages > sub_groups:
            _refuse(config, f"prefetch: {columns} columns cannot be shared out evenly to {sub_groups} sub-groups")
