"""The token sort before the experts and the sum behind them: what the kernels are compiled for, and how many work-groups."""
from __future__ import annotations

from dataclasses import dataclass

from ..problem import Dtype

LANES = 16
LANE_BYTES = 16           # of a lane's widest access
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
    """What the sum of a token's slots is compiled for. columns, stored: consecutive ones that a GPU's lane loads and stores
    at once."""
    hidden_size: int
    input: Dtype
    output: Dtype
    top_k: int
    num_shared: int = 0
    id_bits: int = 32
    has_expert_map: bool = False
    columns: int = 1
    stored: int = 1


def widest_access(*byte_multiples: int) -> int:
    """The widest store that divides all of these addresses, strides and lengths: 16, 8, 4 or 2 bytes."""
    return next(size for size in (16, 8, 4, 2) if all(value % size == 0 for value in byte_multiples))


def default_y_dtype(hidden_states: Dtype) -> Dtype:
    """Of the rows that are summed for each token. bfloat16 has float32's range, and its rounding adds about as much error as
    the result's own; a float16 row may overflow although the sum would not."""
    return Dtype.bf16 if hidden_states is Dtype.bf16 else Dtype.f32


def aligned_columns(columns: int, dtype: Dtype) -> int:
    """So many or a few more, for rows that a lane's widest loads divide."""
    unit = LANE_BYTES // dtype.size
    return -(-columns // unit) * unit


def combine_columns(y_row: tuple[int, int, int], input: Dtype, out_row: tuple[int, int, int], output: Dtype) -> tuple[int, int]:
    """How many columns a lane loads, and stores, at once; rows by address, stride and columns, these two in elements."""
    loads, stores = (widest_access(address, stride * dtype.size, columns * dtype.size) // dtype.size
                     for (address, stride, columns), dtype in ((y_row, input), (out_row, output)))
    return loads, min(loads, stores)


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
