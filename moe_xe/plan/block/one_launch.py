"""The block in one launch: for which calls, and the plan of it."""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..gemm.config import Schedule, TileConfig
from ..launch import LaunchPlan
from ..problem import INT32_MAX, GroupedGemmProblem
from .token_sort import CombineProblem, SortProblem

# Routed pairs. One work-group sorts them with pairs x pairs / 512 steps of 9 instructions a lane: for 1024, 10 us of an Xe core at
# 2.4 GHz, against 36 us of three launches. It also bounds the work-group's memory for their keys.
MOST_PAIRS = 1024
BUSY_ROWS = 64          # of an expert in the mean, from which on its products take longer than its weights' bytes, by the cost model
BOARD_WORDS = 6         # of moe_block.cpp's Board, and one for each expert


@dataclass(frozen=True)
class OneLaunch:
    """What one kernel is compiled for and how it is launched: the plans of its GEMMs, with the number of work-groups of the one launch,
    and what sorts before and sums behind them."""
    gate_up: LaunchPlan[GroupedGemmProblem, TileConfig]
    down: LaunchPlan[GroupedGemmProblem, TileConfig]
    sort: SortProblem
    combine: CombineProblem
    group_size: int

    most_pairs = MOST_PAIRS

    @property
    def row_groups(self) -> int:
        """Pieces of a token's columns, each for a whole work-group."""
        return -(-self.combine.hidden_size // (self.combine.columns * self.group_size))

    @staticmethod
    def board_words(num_experts: int) -> int:
        """Of the memory that work-groups share, zero before the launch; num_experts: routed and shared."""
        return BOARD_WORDS + num_experts


def few_pairs(num_tokens: int, top_k: int) -> bool:
    """Whether one launch can be worth while, before anything else is known of the call."""
    return num_tokens * top_k <= MOST_PAIRS


def gains_from_int8_rows(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether a block of int8 weights is faster with int8 rows, which take several launches."""
    return not few_pairs(num_tokens, top_k) or num_tokens * top_k >= BUSY_ROWS * num_experts


@functools.lru_cache(maxsize=4096)
def plan_one_launch(gate_up: LaunchPlan, down: LaunchPlan, sort: SortProblem, combine: CombineProblem, num_tokens: int,
                    num_experts: int) -> OneLaunch | None:
    """The plan of one launch, or None where the block takes several; num_experts: routed and shared.

    The launches of one kernel have one size and one number of registers, and its work-groups take tiles as they come.
    """
    first, second = gate_up.config, down.config
    if not few_pairs(num_tokens, sort.top_k) or type(first) is not type(second) or gate_up.family is not down.family:
        return None
    if Schedule.static in (first.schedule, second.schedule):
        return None
    if getattr(first, "grf_size", 0) != getattr(second, "grf_size", 0) or getattr(first, "isa", "") != getattr(second, "isa", ""):
        return None
    num_groups = min(gate_up.num_groups, down.num_groups)
    gate_up, down = (replace(gemm, num_groups=num_groups) for gemm in (gate_up, down))
    block = OneLaunch(gate_up, down, sort, combine, max(gate_up.group_size, down.group_size))
    rows = num_tokens * (sort.top_k + sort.num_shared)
    tiles = sum(gemm.config.most_records(gemm.problem, rows, num_experts) * gemm.config.splits for gemm in (gate_up, down))
    return block if tiles + num_tokens * block.row_groups + 2 * num_groups <= INT32_MAX else None
