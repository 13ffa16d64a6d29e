"""Rows to int8 codes -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools

from ..plan.block.activate import QuantizeRowsProblem, sub_groups
from .kernel_source import KernelSource
from .source import assemble

# as in sycl_kernels/kernels/quantize_rows.cpp
SIGNATURE = "pq" + "pq" + "p" + "q"


@functools.lru_cache(maxsize=4096)
def quantize_rows_source(problem: QuantizeRowsProblem, isa: str | None) -> KernelSource:
    """The kernel for this problem; isa: the CPU's vector instructions, None for a GPU."""
    text = assemble("CPU" if isa else "GENERIC", [
        f"inline constexpr int row_size = {problem.row_size}, columns = {problem.columns};",
        f"inline constexpr Dtype input = Dtype::{problem.input.value}, output = input;",
    ], [
        f"inline constexpr Isa isa = Isa::{isa};" if isa else f"inline constexpr int sub_groups = {sub_groups(problem)};",
    ], "quantize_rows.cpp")
    return KernelSource("quantize_rows", SIGNATURE, text)
