"""The token sort before the experts and the sum behind them: what the kernels are compiled for, and how many work-groups."""
from __future__ import annotations

from dataclasses import dataclass

from ..problem import Dtype

LANES = 16
MAX_TOP_K = 64            # gpu/sort_tokens.hpp keeps a token's slots in one word
MAX_PAIRS = 2**30         # kernels count pairs and work-items in int32, and step beyond the last one
MAX_EXPERTS = 2**20
MAX_SORT_SUB_GROUPS = 16  # of a work-group, gpu/sort_tokens.hpp
SORT_TOKENS = 64          # of a sub-group of the sort, at the least
COMBINE_LANES = 256       # of a work-group
CPU_TOKENS = 64           # of a work-group, at the least


@dataclass(frozen=True)
class SortProblem:
    """What the token sort is compiled for. A token has top_k routed slots and num_shared shared ones.

    id_bits: 32 or 64, the integer type of topk_ids. weights, shared_weights: their types, None for 1. zero_access: bytes of
    one store (2, 4, 8 or 16) of zeros to the output rows of dropped tokens; 0 leaves them.
    """
    top_k: int
    num_shared: int = 0
    id_bits: int = 32
    has_expert_map: bool = False
    weights: Dtype | None = None
    shared_weights: Dtype | None = None
    zero_access: int = 0


@dataclass(frozen=True)
class CombineProblem:
    """What the sum of a token's slots is compiled for. columns: consecutive ones that a GPU's lane loads at once."""
    hidden_size: int
    input: Dtype
    output: Dtype
    top_k: int
    num_shared: int = 0
    id_bits: int = 32
    has_expert_map: bool = False
    columns: int = 1


def widest_access(*byte_multiples: int) -> int:
    """The widest store that divides all of these addresses, strides and lengths: 16, 8, 4 or 2 bytes."""
    return next(size for size in (16, 8, 4, 2) if all(value % size == 0 for value in byte_multiples))


def combine_columns(hidden_size: int, y: int, y_stride: int, input: Dtype, out: int, out_stride: int, output: Dtype) -> int:
    """4 where that many columns of y and of out are aligned in every row, else 1. y, out: addresses; strides in elements."""
    aligned = (y % (4 * input.size) == 0 and out % (4 * output.size) == 0 and
               all(value % 4 == 0 for value in (hidden_size, y_stride, out_stride)))
    return 4 if aligned else 1


def sort_groups(num_tokens: int, num_experts: int, is_cpu: bool, cores: int) -> tuple[int, int]:
    """Work-groups of the sort and work-items in each: on a GPU a work-group sorts one expert's tokens."""
    if is_cpu:
        return _cpu_groups(num_tokens, cores), 1
    sub_groups = min(max(-(-num_tokens // SORT_TOKENS), 1), MAX_SORT_SUB_GROUPS)
    return num_experts, sub_groups * LANES


def row_groups(problem: CombineProblem) -> int:
    """Work-groups that share a token's columns, on a GPU."""
    return -(-problem.hidden_size // (problem.columns * COMBINE_LANES))


def combine_groups(problem: CombineProblem, num_tokens: int, is_cpu: bool, cores: int) -> tuple[int, int]:
    """Work-groups of the combine and work-items in each."""
    if is_cpu:
        return _cpu_groups(num_tokens, cores), 1
    parts = row_groups(problem)
    lanes = -(-problem.hidden_size // (problem.columns * parts))
    return num_tokens * parts, -(-lanes // LANES) * LANES


def _cpu_groups(num_tokens: int, cores: int) -> int:
    return max(min(cores, num_tokens // CPU_TOKENS), 1)
