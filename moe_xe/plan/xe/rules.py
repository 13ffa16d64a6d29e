"""Which configurations a problem can have on an Xe GPU. Each rule says why it rejects, or None.

Hard rules are what sycl_kernels/include/moe_xe/{k_loop_xe,mainloop_xe_*}.hpp and a launch need; soft ones only keep
configurations from the default choice that are known to be bad, or are not known to be good.
"""
from __future__ import annotations

from ..formats import ScaleType
from ..gemm.config import XeConfig
from ..model.cost import STEP_BYTES, counted_instructions, variant_of
from ..model.devices import RECORDS, DeviceRecord
from ..problem import Dtype, GroupedGemmProblem, WeightLayout

REGISTERS = 256                 # of a thread, or half as many and twice the threads
OTHER_REGISTERS = 16            # addresses and payloads, what a thread needs beside sums and operands
THREADS_PER_ENGINE = 4          # with 256 registers each
LINES = 32                      # of a block message, at most
MOST_PADDING = 1.25             # of N, beside the width that pads least
MOST_SUMS = 32 * 64             # of a sub-group that has no registers to spare (beside a shorter tile 192 to 256 bytes spill)
FOUR_LINES_ROWS = 4             # gathered rows that a sub-group prefetches four lines at a time (xe/k_loop.hpp)
CODE_OPERANDS = 16              # registers of operands on the way
SCALE_ROUND = 128               # elements of K whose scales load at once
QUEUE_SLM = 1 << 10             # the tile queue's share of L1, at most


def most_sub_groups(device: DeviceRecord | None, grf_size: int = REGISTERS) -> int:
    """Of a work-group, on this device or on any that has a record. Raises ValueError for a device that is no Xe GPU."""
    if device is not None and device.architecture is None:
        raise ValueError(f"device must be an Xe GPU with an architecture, got {device.name}")
    devices = RECORDS if device is None else (device,)
    return THREADS_PER_ENGINE * REGISTERS // grf_size * min(record.architecture.engines for record in devices)


# ---- hard rules

def blocks(problem: GroupedGemmProblem) -> tuple[int, int]:
    """Rows and columns of sums that one dpas makes: tokens are its 16 lanes for [E, N, K] weights, else its 8 rows."""
    return (16, 8) if problem.weights is WeightLayout.enk else (8, 16)


def runs(problem: GroupedGemmProblem) -> int:
    """In how many runs of the weights a sub-group's columns lie: gates and up values may be halves of N."""
    return 2 if problem.pairs and not problem.activation.interleaved else 1


def sub_group_reason(problem: GroupedGemmProblem, rows: int, columns: int, grf_size: int = REGISTERS) -> str | None:
    """Why no sub-group can compute rows x columns."""
    row_block, column_block = blocks(problem)
    if rows % row_block or columns % column_block:
        return f"sub-groups: {rows}x{columns} are not multiples of dpas' {row_block}x{column_block}"
    least = 2 * column_block
    if problem.pairs and columns % least:
        return f"pairs: gate and up values need multiples of {least} columns, got {columns}"
    registers = rows * columns // 16 + _operand_registers(problem, rows, columns) + OTHER_REGISTERS
    if registers > grf_size:
        return f"registers: sums, operands of a step and addresses take {registers} of {grf_size}"
    return _message_reason(problem, rows, columns)


def _operand_registers(problem: GroupedGemmProblem, rows: int, columns: int) -> int:
    """Of a step. Beside codes of [E, N, K] tokens come half by half. 16 rows of codes have an address, scales for now and later
    (xe/scales.hpp) and factors, which fill registers as operands do in f16 (xe/factors.hpp)."""
    quantization = problem.quantization
    if quantization is None:
        return rows + columns
    factors = 8 * (1 + quantization.zeros + (quantization.scales is ScaleType.f32)) if problem.input is Dtype.f16 else 2
    rows_are_n = problem.weights is WeightLayout.enk
    scaled_rows, span = (-(-columns // 16), SCALE_ROUND) if rows_are_n else (2, columns)
    scales = 2 * max(1, span // quantization.columns) * (1 + quantization.zeros)
    tokens = rows // 2 if rows_are_n else rows
    return tokens + columns // 2 + CODE_OPERANDS + scaled_rows * (2 + scales + factors)


def _message_reason(problem: GroupedGemmProblem, rows: int, columns: int) -> str | None:
    run_columns, outputs = columns // runs(problem), columns // (2 if problem.pairs else 1)
    if problem.weights is WeightLayout.enk:
        if run_columns > LINES and run_columns % LINES:
            return f"messages: {run_columns} columns of weights are neither at most {LINES} nor a multiple of it"
        return f"messages: {outputs} outputs a row are neither 8 nor a multiple of 16" if outputs != 8 and outputs % 16 else None
    if rows > LINES and not problem.gathered:
        return f"messages: more than {LINES} rows a sub-group"
    if problem.quantization is not None and columns & (columns - 1):
        return f"messages: {columns} columns of codes are no power of two"
    wide = [outputs] * (problem.output is not Dtype.f32) + [run_columns] * (problem.input is not Dtype.f32)
    return next((f"messages: {width} columns are neither 16 nor a multiple of 32" for width in wide if width > 16 and width % 32), None)


def tile_reason(problem: GroupedGemmProblem, height: int, width: int, rows: int, columns: int, most: int) -> str | None:
    """Why a tile cannot be shared out to at most so many sub-groups of rows x columns."""
    if height % rows or width % columns:
        return f"sub-groups: {rows}x{columns} do not divide the tile"
    sub_groups = height // rows * (width // columns)
    if sub_groups > most:
        return f"threads: {sub_groups} sub-groups, an Xe core has {most}"
    if sub_groups % runs(problem):
        return f"prefetch: gates and up values need an even number of sub-groups, got {sub_groups}"
    by_k = problem.weights is WeightLayout.ekn
    step = STEP_BYTES // problem.input.size         # [E, K, N]: a step's rows of K are shared out, too
    all_lines = step * width * problem.weight_bits // (8 * STEP_BYTES) if by_k else width
    lines, most_lines = all_lines // sub_groups, step if by_k else LINES
    message = max(min(lines, most_lines), 1)
    if all_lines % sub_groups or lines % message:
        return f"prefetch: {width} columns' lines cannot be shared out evenly to {sub_groups} sub-groups"
    if by_k and (step % message or sub_groups // runs(problem) % (step // message)):
        return f"prefetch: {step} rows of K cannot be shared out evenly to {sub_groups} sub-groups"
    if -(-height // sub_groups) > LINES and not problem.gathered:
        return f"prefetch: more than {LINES} rows a sub-group"
    return None


def check_xe_config(problem: GroupedGemmProblem, config: XeConfig, device: DeviceRecord | None = None) -> None:
    """ValueError that names the rule if the configuration cannot be compiled or launched; device None: on some Xe GPU.

    What is merely slow, or may spill, passes. TypeError if it is no XeConfig.
    """
    if not isinstance(config, XeConfig):
        raise TypeError(f"config must be an XeConfig, got {type(config).__name__}")
    most = most_sub_groups(device, config.grf_size)
    for height, rows, columns in zip(config.heights, config.sub_group_rows, config.sub_group_columns):
        reason = sub_group_reason(problem, rows, columns, config.grf_size) or tile_reason(problem, height, config.tile_width, rows, columns, most)
        if reason:
            raise ValueError(f"config's tile {height}x{config.tile_width} in sub-groups {rows}x{columns}: {reason}")


# ---- soft rules

def shape_spills(problem: GroupedGemmProblem, rows: int, columns: int, device: DeviceRecord) -> str | None:
    """Why sub-groups of rows x columns may spill."""
    counted = counted_instructions()[device.architecture.counted][variant_of(problem)]
    return None if f"{rows}x{columns}" in counted else "spills: not among the shapes that were compiled and are known not to spill"


def tile_spills(problem: GroupedGemmProblem, height: int, width: int, rows: int, columns: int) -> str | None:
    """Why a tile's sub-groups spill, although their shape need not."""
    if problem.weights is WeightLayout.ekn or rows * columns < MOST_SUMS:
        return None
    quantization = problem.quantization
    if quantization and not quantization.finite and problem.input is Dtype.f16 and quantization.scales is ScaleType.f32:
        return "spills: looking for codes that are no numbers leaves no registers for two factors of each row"
    if not problem.gathered:
        return None
    sub_groups = height // rows * (width // columns)
    if width // sub_groups > LINES:
        return "spills: gathered tokens' addresses leave no registers for two messages of prefetched columns"
    if -(-height // sub_groups) <= FOUR_LINES_ROWS:
        return "spills: gathered tokens' addresses leave no registers for a prefetch of four lines of a token at once"
    return None


def width_reason(problem: GroupedGemmProblem, width: int, widths: tuple[int, ...]) -> str | None:
    """Why tiles should not be so wide, where they could be as wide as the others."""
    padded, least = (min(-(-problem.n // w) * w for w in some) for some in ((width,), widths))
    return f"tail: pads N = {problem.n} to {padded}, another width to {least}" if padded > MOST_PADDING * least else None


def cache_reason(config: XeConfig, device: DeviceRecord) -> str | None:
    """Why what is prefetched is gone before it is read."""
    ahead = (config.prefetch_distance + 1) * (config.heights[0] + config.tile_width) * STEP_BYTES + QUEUE_SLM
    l1 = device.architecture.l1_bytes
    return f"L1: {ahead} bytes of prefetched lines and SLM, an Xe core has {l1}" if ahead > l1 else None
