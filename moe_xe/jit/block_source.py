"""The block in one launch -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools

from ..plan.block.one_launch import OneLaunch
from ..plan.block.token_sort import MAX_EXPERTS
from .inlined import renamed
from .kernel_source import KernelSource
from .source import family_of, gemm_constants, preamble
from .token_sort_source import combine_constants, sort_constants

KERNEL_NAME = "moe_block"
# twenty-seven pointers, seventeen strides, the factor, three sizes: as in sycl_kernels/kernels/moe_block.cpp
KERNEL_SIGNATURE = 27 * "p" + 17 * "q" + "f" + 3 * "i"


@functools.lru_cache(maxsize=1024)
def block_source(block: OneLaunch) -> KernelSource:
    """The kernel for this plan."""
    gemms, config = (block.gate_up, block.down), block.gate_up.config
    family = family_of(config)
    device = "cpu" if family == "CPU" else "gpu"
    headers = [f"moe_xe/{device}/team.hpp", "moe_xe/queue/tile_queue.hpp", f"moe_xe/{family.lower()}/mainloop.hpp"]
    parts = [renamed(namespace, family, *gemm_constants(gemm.problem, gemm.config), headers)
             for namespace, gemm in zip(("gate_up", "down"), gemms)]
    routing = renamed("routing", family, combine_constants(block.combine) + sort_constants(block.sort), [
        f"inline constexpr int most_pairs = {block.most_pairs}, most_experts = {MAX_EXPERTS}, row_groups = {block.row_groups};",
        *([f"inline constexpr Isa isa = Isa::{config.isa};"] if family == "CPU" else []),
    ], [f"moe_xe/{device}/{'sort_tokens' if family == 'CPU' else 'sort_few'}.hpp", "moe_xe/routing/combine.hpp"])
    text = "\n".join([*preamble(family, getattr(config, "grf_size", 256)), *parts, routing, "#include <kernels/moe_block.cpp>", ""])
    return KernelSource(KERNEL_NAME, KERNEL_SIGNATURE, text)
