"""Every choice that is made without measuring, as pure functions of the problem, the operands and the device."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from ..model.devices import DeviceRecord
from ..model.schedule import Rows, evenly, over_ranks, runs_of
from ..problem import Dtype, GroupedGemmProblem, Operands, WeightLayout
from ..xe.candidates import choose_xe_config
from ..xe.rules import SCALE_ROUND
from .config import TILE_INPUTS, CpuConfig, GenericConfig, Schedule, TileConfig, isas_of, tiles_multiply
from .splits import choose_splits, num_tiles


class Family(str, Enum):
    """Which inner loop: dpas on Xe, explicit vectors on the CPU device, plain FMA anywhere else."""
    xe = "xe"
    cpu = "cpu"
    generic = "generic"


# What a 2D block message takes (Intel's LSC block2d messages), in bytes.
SURFACE_BASE_ALIGNMENT = 64
SURFACE_PITCH_ALIGNMENT = 16
SURFACE_WIDTH_ALIGNMENT = 4
SURFACE_MIN_WIDTH = 64
SURFACE_LIMIT = 1 << 24          # of width and pitch in bytes, of height in rows
LANE_ACCESS = 16                 # what one lane loads or stores at once (xe/mainloop_*.hpp)
SCALE_ACCESS = 4                 # of scales and zeros, at most (xe/scales.hpp)
OPERAND_K = 16                   # elements of K of a dpas operand: one group's


def _surface_fits(base: int, width: int, height: int, pitch: int) -> bool:
    return (base % SURFACE_BASE_ALIGNMENT == 0 and pitch % SURFACE_PITCH_ALIGNMENT == 0 and width % SURFACE_WIDTH_ALIGNMENT == 0 and
            SURFACE_MIN_WIDTH <= width <= pitch < SURFACE_LIMIT and height < SURFACE_LIMIT)


def fits_block_messages(problem: GroupedGemmProblem, operands: Operands) -> bool:
    """True where the operands are what sycl_kernels/include/moe_xe/xe/mainloop.hpp asks for."""
    size, out_size = problem.input.size, problem.output.size
    swapped = problem.weights is WeightLayout.enk
    halves = problem.pairs and not problem.activation.interleaved
    routed = operands.num_experts - problem.shared
    if swapped:     # each lane stores its own row of d
        d_fits = operands.d % LANE_ACCESS == 0 and operands.d_stride * out_size % LANE_ACCESS == 0 and operands.d_stride * out_size < SURFACE_LIMIT
    else:
        d_rows = operands.d_rows if problem.scattered else operands.total_rows
        d_fits = _surface_fits(operands.d, problem.out_n * out_size, d_rows, operands.d_stride * out_size)

    def weights_fit(base: int, columns: int, stride: int, experts: int, expert_stride: int) -> bool:
        w_rows, w_columns = (columns, problem.k) if swapped else (problem.k, columns)
        row, pitch, expert = (count * problem.weight_bits // 8 for count in (w_columns, stride, expert_stride))
        return _surface_fits(base, row, w_rows, pitch) and (experts <= 1 or expert % SURFACE_BASE_ALIGNMENT == 0)

    shared_columns = problem.out_n if halves else problem.n
    return (d_fits and problem.k * size % LANE_ACCESS == 0 and
            _surface_fits(operands.a, problem.k * size, operands.a_rows, operands.a_stride * size) and
            (routed == 0 or weights_fit(operands.w, problem.n, operands.w_stride, routed, operands.w_expert_stride)) and
            all(weights_fit(base, shared_columns, operands.shared_stride, problem.shared, operands.shared_expert_stride)
                for base in (operands.shared_w, *([operands.shared_up] if halves else []))[:2 * problem.shared]))


def codes_fit(problem: GroupedGemmProblem, operands: Operands) -> bool:
    """True where codes and scales are what sycl_kernels/include/moe_xe/xe/scales.hpp asks for."""
    quantization = problem.quantization
    if quantization is None:
        return True
    group, has_zero = quantization.columns, quantization.zeros or quantization.zero != 0
    columns = problem.k if problem.weights is WeightLayout.enk else problem.n
    groups_fit = group % OPERAND_K == 0 and (group % SCALE_ROUND == 0 or SCALE_ROUND % group == 0) or group >= columns
    return (problem.input is not Dtype.f32 and groups_fit and (problem.weights is WeightLayout.enk or not problem.pairs) and
            (quantization.codes.is_integer or not has_zero) and operands.scales % SCALE_ACCESS == 0 and operands.zeros % SCALE_ACCESS == 0)


def has_wide_dpas(has_matrix_engine: bool, sub_group_sizes: Sequence[int]) -> bool:
    """True from PVC and Xe2 on: sub-groups of 8 mark the generation before, with narrower dpas and no 2D block messages."""
    return has_matrix_engine and 8 not in sub_group_sizes


def choose_family(problem: GroupedGemmProblem, operands: Operands, is_cpu: bool, has_dpas: bool) -> Family:
    if is_cpu:
        return Family.cpu
    exact_f32 = problem.input is Dtype.f32 and not problem.tf32
    fits = fits_block_messages(problem, operands) and codes_fit(problem, operands)
    return Family.xe if has_dpas and not exact_f32 and fits else Family.generic


def heights_for(total_rows: int, heights: tuple[int, ...]) -> int:
    """Index of the first height worth compiling: taller ones than the smallest that holds all rows are never used."""
    return max([i for i, height in enumerate(heights) if height >= total_rows], default=0)


@functools.lru_cache(maxsize=1024)
def generic_config(problem: GroupedGemmProblem, total_rows: int, schedule: Schedule = Schedule.dynamic) -> GenericConfig:
    heights = (64, 32, 16)
    first = heights_for(total_rows, heights)
    return GenericConfig(heights=heights[first:], tile_width=128, raster_group=8, min_fill_eighths=7, schedule=schedule,
                         sub_group_rows=(8, 8, 4)[first:], sub_group_columns=((32, 32, 32) if problem.pairs else (32, 16, 16))[first:])


# micro_rows, micro_columns, k_block, unpacked_rows, dot_rows. avx2, avx512 and amx were measured (docs/performance.md); the
# micro kernel fills the vector registers of each: 12 of 16, or 28 of 32, are accumulators. Those of AMX are four tiles.
CPU_KERNELS = {"amx_fp16": (32, 32, 1024, 4, 4), "amx": (32, 32, 1024, 4, 4), "avx512_bf16": (14, 32, 512, 8, 4),
               "avx512": (14, 32, 512, 8, 4), "avx2": (6, 16, 256, 8, 4), "baseline": (6, 8, 256, 8, 4)}
# Of 4-bit codes more rows are worth reading in place: packed, 10 of them take 1.2 to 1.4 times as long and 16 1.0 to 1.2 (Zen 3; FMA of an Emerald
# Rapids), by its AMX 5 of them 1.1 to 1.6 times and 8 0.9 to 1.3. Not measured beside vdpbf16ps.
FOUR_BIT_UNPACKED_ROWS = {"amx": 8, "avx512": 16, "avx2": 16}
AMX_K_BLOCK_IN_PLACE = 2048     # of weights that need no packing: fewer sums between blocks
AMX_CORES_K_BLOCK = 256         # of other kernels on CPUs with AMX: a panel of float32 fits in their first cache
AMX_CORES_PREFETCH_BYTES = 8192 # and of few rows
AVX2_PREFETCH_BYTES = 256       # of few rows of dense weights: on a Zen 3, one row took 1.04 to 1.12 times as long with 4096
CPU_HEIGHT, AMX_HEIGHT = 168, 256
CPU_WIDTHS, AMX_WIDTHS = (192, 96, 64), (384, 192, 96, 64)
CPU_TILES_A_CORE = 16           # wider tiles pack rows less often; with fewer of them, cores wait for the last one


def fast_isa(isa: str, device_name: str) -> str:
    """The fastest of the vector instructions up to `isa` on this CPU.

    Intel's cores take longer for a vdpbf16ps than for the two FMAs that it replaces: packed blocks were measured at 1.6
    times the time, dot products at the same. Where they have AMX, blocks need neither.
    """
    return "avx512" if isa == "avx512_bf16" and "intel" in device_name.lower() else isa


ISA_VARIABLE = "MOE_XE_CPU_ISA"


def chosen_isa(best: str, device_name: str, wanted: str) -> str:
    """The vector instructions of kernels: those that are wanted, else the fastest. best: the newest that the CPU has.

    Raises ValueError for what it has not."""
    usable = isas_of(best)
    if wanted and wanted not in usable:
        raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(usable)} on this CPU, got {wanted!r}")
    return wanted or fast_isa(best, device_name)


def isa_for(input: Dtype, isa: str, dense: bool = True) -> str:
    """The instructions that multiply `input`, of a CPU whose best are `isa`: on cores with AMX what its tiles do not take is best multiplied by FMA."""
    if isa not in TILE_INPUTS:
        return isa
    return next((tiles for tiles in isas_of(isa) if tiles_multiply(tiles, input, dense)), "avx512")


@functools.lru_cache(maxsize=1024)
def cpu_config(problem: GroupedGemmProblem, isa: str, schedule: Schedule = Schedule.dynamic) -> CpuConfig:
    """With the widest tiles. isa: the CPU's best."""
    has_tiles, isa = isa in TILE_INPUTS, isa_for(problem.input, isa, problem.quantization is None)
    micro_rows, micro_columns, k_block, unpacked_rows, dot_rows = CPU_KERNELS[isa]
    height, width = CPU_HEIGHT, CPU_WIDTHS[0]
    if isa in TILE_INPUTS:
        height, width = AMX_HEIGHT, AMX_WIDTHS[0]
        in_place = problem.weights is WeightLayout.enk and (problem.quantization is None or problem.input is Dtype.i8)
        k_block = AMX_K_BLOCK_IN_PLACE if in_place else k_block
    elif has_tiles:
        k_block = AMX_CORES_K_BLOCK
    if problem.weights is WeightLayout.enk and problem.quantization is not None and problem.quantization.codes.bits == 4:
        unpacked_rows = FOUR_BIT_UNPACKED_ROWS.get(isa, unpacked_rows)
    config = CpuConfig(heights=(height,), tile_width=width, raster_group=1, min_fill_eighths=8, schedule=schedule, isa=isa,
                       micro_rows=micro_rows, micro_columns=micro_columns, k_block=k_block, unpacked_rows=unpacked_rows,
                       dot_rows=dot_rows, prefetch_columns=16)
    return replace(config, prefetch_bytes=AVX2_PREFETCH_BYTES) if isa == "avx2" and problem.quantization is None else config


def _few_rows_isa(problem: GroupedGemmProblem) -> str:
    """The instructions that multiply few rows best on cores with AMX. Their FMA is as fast as their pairs of bf16, which FP8 becomes sooner, by
    two tables; other codes are multiplied as integers, in pairs."""
    return "avx512" if problem.quantization is None else "avx512_bf16"


def _cpu_tiles(problem: GroupedGemmProblem, isa: str, schedule: Schedule, load: Sequence[Rows], cores: int, most_rows: int) -> CpuConfig:
    """The widest tiles of which there are enough; the widest of all are for rows that are packed.

    Where no expert has more rows than are read in place, tiles have no more: half of the kernel is not compiled."""
    config = cpu_config(problem, isa, schedule)
    if most_rows <= config.unpacked_rows:
        few = config.unpacked_rows
        if isa in TILE_INPUTS and problem.input is not Dtype.i8:      # whose rows are packed
            config = replace(cpu_config(problem, _few_rows_isa(problem), schedule), unpacked_rows=few, prefetch_bytes=AMX_CORES_PREFETCH_BYTES)
        config = replace(config, heights=(few,))
    packed = max(max(runs_of(rows)) for rows in load) > config.unpacked_rows
    widths = AMX_WIDTHS if config.isa in TILE_INPUTS and packed else CPU_WIDTHS
    enough = (width for width in widths if num_tiles(problem, replace(config, tile_width=width), load) >= CPU_TILES_A_CORE * cores)
    return replace(config, tile_width=next(enough, widths[-1]))


def choose_config(problem: GroupedGemmProblem, family: Family, total_rows: int, num_experts: int, cores: int, *,
                  isa: str | None = None, record: DeviceRecord | None = None, schedule: Schedule = Schedule.dynamic,
                  most_rows: int | None = None) -> TileConfig:
    """The configuration of one launch; isa: the CPU's vector instructions (family cpu); record: the GPU's (family xe); most_rows: that
    one expert has, as far as is known."""
    if family is Family.xe:
        return choose_xe_config(problem, total_rows, num_experts, record, schedule)
    load = [over_ranks(rows, problem.ranks) for rows in evenly(total_rows, num_experts)]
    most_rows = total_rows if most_rows is None else most_rows
    config = (_cpu_tiles(problem, isa or "baseline", schedule, load, cores, most_rows) if family is Family.cpu else
              generic_config(problem, total_rows, schedule))
    splits = choose_splits(problem, config, load, cores)
    return config if splits == 1 else replace(config, splits=splits)
