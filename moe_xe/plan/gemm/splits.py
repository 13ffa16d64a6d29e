"""Where K is shared out over work-groups, because there are fewer tiles than cores."""
from __future__ import annotations

from collections.abc import Sequence

from ..model.schedule import Rows, cut_of, num_rows
from ..problem import GroupedGemmProblem
from .config import LEAST_PART, MOST_PARTS, TileConfig

__all__ = ["choose_splits", "num_tiles", "parts_reason", "possible_splits"]

SPLITS = (2, 4, 8)


def num_tiles(problem: GroupedGemmProblem, config: TileConfig, tokens_per_expert: Sequence[Rows]) -> int:
    return sum(len(cut_of(rows, config)) for rows in tokens_per_expert) * -(-problem.n // config.tile_width)


def parts_reason(problem: GroupedGemmProblem, splits: int, tiles: int) -> str | None:
    """Why K of at most so many tiles cannot be in so many parts."""
    if splits > 1 and problem.quantization is not None:
        return "splits must be 1 for quantised weights"
    if splits > 1 and problem.k < splits * LEAST_PART:
        return f"splits must leave at least {LEAST_PART} elements of K to each part, K is {problem.k}"
    if splits > 1 and tiles * splits > MOST_PARTS:
        return f"splits are for few tiles: tiles x splits must be at most {MOST_PARTS}, but there can be {tiles} tiles"
    return None


def possible_splits(problem: GroupedGemmProblem, config: TileConfig, tokens_per_expert: Sequence[Rows], cores: int) -> list[int]:
    """None where every core has a tile, nor for quantised weights."""
    if num_tiles(problem, config, tokens_per_expert) >= cores:
        return []
    entries = config.most_records(problem, sum(map(num_rows, tokens_per_expert)), len(tokens_per_expert))
    return [splits for splits in SPLITS if parts_reason(problem, splits, entries) is None]


def choose_splits(problem: GroupedGemmProblem, config: TileConfig, tokens_per_expert: Sequence[Rows], cores: int) -> int:
    """The fewest that keep the cores as busy as can be."""
    tiles = num_tiles(problem, config, tokens_per_expert)
    possible = possible_splits(problem, config, tokens_per_expert, cores)
    return min([1, *possible], key=lambda splits: (-(-tiles * splits // cores) / splits, splits))
