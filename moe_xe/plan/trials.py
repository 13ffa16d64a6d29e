"""The few configurations besides the default that are worth measuring for a call, by device family."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .gemm.config import CpuConfig, TileConfig, XeConfig
from .gemm.splits import choose_splits as choose_k_splits, parts_reason
from .launch import LaunchPlan, Target
from .model.schedule import Rows, num_rows, runs_of
from .outer.config import OuterConfig, OuterCpuConfig, OuterOperands, OuterSubGroupConfig
from .outer.heuristics import CPU_TILES, MAX_SPLITS, can_split, choose_splits
from .problem import Operands
from .xe.candidates import best_xe_configs

__all__ = ["trial_configs"]

XE_TRIALS = 4


def trial_configs(plan: LaunchPlan, operands: Operands | OuterOperands, tokens_per_expert: Sequence[Rows],
                  target: Target) -> list[TileConfig] | list[OuterConfig]:
    """Configurations of the plan's kind, each worth its compilation for these rows of each expert."""
    if isinstance(plan.config, OuterConfig):
        return list(_outer_trials(plan, operands, target.cores))
    trials = [*_tile_trials(plan, tokens_per_expert, target), *_split_trials(plan, tokens_per_expert, target.cores)]
    return [trial if _few_tiles(plan, trial, operands) else replace(trial, splits=1) for trial in trials]


def _few_tiles(plan: LaunchPlan, config: TileConfig, operands: Operands) -> bool:
    """Whether so many parts are allowed, which smaller tiles may be too many for."""
    tiles = config.most_records(plan.problem, operands.total_rows, operands.num_experts)
    return parts_reason(plan.problem, config.splits, tiles) is None


def _tile_trials(plan: LaunchPlan, tokens_per_expert: Sequence[Rows], target: Target) -> list[TileConfig]:
    config = plan.config
    if isinstance(config, XeConfig):
        best = best_xe_configs(plan.problem, tokens_per_expert, target.record, XE_TRIALS)
        return [replace(trial, schedule=config.schedule) for trial in best]
    if isinstance(config, CpuConfig):
        active_experts = sum(num_rows(rows) > 0 for rows in tokens_per_expert)
        most_rows = max(max(runs_of(rows)) for rows in tokens_per_expert)
        return list(_cpu_trials(config, most_rows, active_experts, plan.problem.n, plan.problem.k, target.cores))
    return [replace(config, tile_width=width) for width in (64, 256) if width % max(config.sub_group_columns) == 0]


def _split_trials(plan: LaunchPlan, tokens_per_expert: Sequence[Rows], cores: int) -> list[TileConfig]:
    """K shared out if it is not, where there are few tiles; or not, if it is."""
    config = plan.config
    splits = choose_k_splits(plan.problem, config, tokens_per_expert, cores) if config.splits == 1 else 1
    return [replace(config, splits=splits)] if splits != config.splits else []


def _cpu_trials(config: CpuConfig, most_rows: int, active_experts: int, n: int, k: int,
                cores: int) -> Iterator[CpuConfig]:
    """One change at a time: of how tiles of few rows are read, or of the blocks that are packed."""
    for tile_width in _others(config.tile_width, (96, 192, 384, 768), n):
        yield replace(config, tile_width=tile_width)
    if most_rows <= config.unpacked_rows:
        yield replace(config, prefetch_bytes=2 * config.prefetch_bytes)
        yield replace(config, prefetch_bytes=config.prefetch_bytes // 8)      # CPUs differ by as much
        if config.dot_rows > 1 and most_rows > 1:
            yield replace(config, dot_rows=config.dot_rows - 1)
        if active_experts < cores:
            yield replace(config, threads=max(cores // 2, 1))
    else:
        for height in _others(config.heights[0], (84, 168, 336), most_rows):
            yield replace(config, heights=(height,))
        for k_block in _others(config.k_block, (config.k_block // 2, 2 * config.k_block), k):
            yield replace(config, k_block=k_block)
        if most_rows <= 3 * config.unpacked_rows:
            yield replace(config, unpacked_rows=2 * config.unpacked_rows)


def _others(size: int, sizes: Sequence[int], most: int) -> list[int]:
    """Sizes that differ from this one where no more than `most` is there to be cut."""
    return list({min(other, most): other for other in reversed(sizes) if min(other, most) != min(size, most)}.values())


def _outer_trials(plan: LaunchPlan, operands: OuterOperands, cores: int) -> Iterator[OuterConfig]:
    config, problem = plan.config, plan.problem
    if can_split(problem, operands):
        for splits in {config.splits // 2, 2 * config.splits} - {0}:
            if splits <= MAX_SPLITS:
                yield replace(config, splits=splits)
    if isinstance(config, OuterCpuConfig):
        tiles = [*CPU_TILES, (84, 96)]
        for tile in tiles:
            if tile != (config.tile_rows, config.tile_columns):
                yield replace(config, tile_rows=tile[0], tile_columns=tile[1],
                              splits=choose_splits(problem, operands, *tile, cores))
        for row_block in (config.row_block // 2, 2 * config.row_block):
            yield replace(config, row_block=row_block)
    elif isinstance(config, OuterSubGroupConfig):
        rows, columns = config.sub_group_rows, config.sub_group_columns
        for tile in ((config.tile_rows // 2, config.tile_columns), (config.tile_rows, config.tile_columns // 2)):
            if tile[0] % rows == 0 and tile[1] % columns == 0 and min(tile) > 0:
                yield replace(config, tile_rows=tile[0], tile_columns=tile[1],
                              splits=choose_splits(problem, operands, *tile, cores))
