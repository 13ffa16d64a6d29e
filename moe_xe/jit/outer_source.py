"""Problem and configuration of the weights' gradient -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools

from ..plan.outer.config import OuterConfig, OuterCpuConfig, OuterProblem, OuterXeConfig
from .kernel_source import KernelSource
from .source import assemble, bool_constant, constants_of

KERNEL_NAME = "grouped_outer"
# eight pointers, nine int64, num_experts: the fields of OuterArguments in outer_types.hpp
KERNEL_SIGNATURE = 8 * "p" + 9 * "q" + "i"


@functools.lru_cache(maxsize=4096)
def grouped_outer_source(problem: OuterProblem, config: OuterConfig) -> KernelSource:
    """The kernel for this problem and configuration."""
    return KernelSource(KERNEL_NAME, KERNEL_SIGNATURE, generate(problem, config))


def generate(problem: OuterProblem, config: OuterConfig) -> str:
    """C++ text of the weights' gradient for this problem and configuration."""
    family = "CPU" if isinstance(config, OuterCpuConfig) else "XE" if isinstance(config, OuterXeConfig) else "GENERIC"
    return assemble(family, [
        f"inline constexpr int64 p = {problem.p}, q = {problem.q};",
        f"inline constexpr Dtype input = Dtype::{problem.input.value}, output = Dtype::{problem.output.value};",
        f"inline constexpr RowsFormat rows_format = RowsFormat::{problem.rows_format.value};",
        f"using RowCount = int{problem.rows_bits};",
        f"inline constexpr Gathered gathered = Gathered::{problem.gathered.value};",
        f"inline constexpr int slots = {problem.slots}, ranks = {problem.ranks};",
        f"inline constexpr bool accumulate = {bool_constant(problem.accumulate)};",
    ], [
        f"inline constexpr int64 scratch_bytes = {config.scratch_bytes(problem)};",
        *constants_of(config),
    ], "grouped_outer.cpp")
