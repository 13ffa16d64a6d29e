"""Sort and combine problems -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools

from ..plan.block.token_sort import CombineProblem, SortProblem, row_groups
from ..plan.problem import Dtype
from .kernel_source import KernelSource
from .source import assemble, bool_constant

# as in sycl_kernels/kernels/sort_tokens.cpp and combine.cpp
SORT_SIGNATURE = "pqpi" + "pqpqf" + "pppp" + "i" + "pqq" + "ii"
COMBINE_SIGNATURE = "pq" + "pqpi" + "pq" + "ii"


def _slots(problem: SortProblem | CombineProblem) -> list[str]:
    return [f"inline constexpr int top_k = {problem.top_k}, num_shared = {problem.num_shared};",
            f"using Id = int{problem.id_bits};",
            f"inline constexpr bool has_expert_map = {bool_constant(problem.has_expert_map)};"]


def _weights(name: str, dtype: Dtype | None) -> str:
    return (f"inline constexpr bool has_{name} = {bool_constant(dtype is not None)}; "
            f"inline constexpr Dtype {name} = Dtype::{(dtype or Dtype.f32).value};")


@functools.lru_cache(maxsize=4096)
def sort_source(problem: SortProblem, is_cpu: bool) -> KernelSource:
    """The token sort for this problem."""
    text = assemble("CPU" if is_cpu else "GENERIC", [*_slots(problem), *sort_constants(problem)], [], "sort_tokens.cpp")
    return KernelSource("sort_tokens", SORT_SIGNATURE, text)


def sort_constants(problem: SortProblem) -> list[str]:
    """What the sort has beside the slots, for the namespace `problem`."""
    return [_weights("weights", problem.weights), _weights("shared_weights", problem.shared_weights),
            f"inline constexpr int zero_access = {problem.zero_access};"]


@functools.lru_cache(maxsize=4096)
def combine_source(problem: CombineProblem, isa: str | None) -> KernelSource:
    """The sum over slots for this problem; isa: the CPU's vector instructions, None for a GPU."""
    text = assemble("CPU" if isa else "GENERIC", combine_constants(problem), [
        f"inline constexpr Isa isa = Isa::{isa};" if isa else f"inline constexpr int row_groups = {row_groups(problem)};"],
        "combine.cpp")
    return KernelSource("combine", COMBINE_SIGNATURE, text)


def combine_constants(problem: CombineProblem) -> list[str]:
    """The lines of its namespace `problem`."""
    return [*_slots(problem),
            f"inline constexpr int hidden_size = {problem.hidden_size}, columns = {problem.columns}, stored = {problem.stored};",
            f"inline constexpr Dtype input = Dtype::{problem.input.value}, output = Dtype::{problem.output.value};"]
