"""Configurations of the CPU device that differ in what MOE_XE_PRINT_CONFIG says, for the tests of given ones; sizes for them."""
from dataclasses import replace

from moe_xe import runtime
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

N, K = 102, 75      # of products in many tests, which share kernels: no multiples of a tile or a vector

ISA = "avx2" if runtime.cpu_isa() != "baseline" else "baseline"     # wider ones take longer to compile


def tile(width: int):
    return replace(cpu_config(GroupedGemmProblem(N, K, Dtype.bf16, Dtype.bf16), ISA), tile_width=width)


def outer_tile(columns: int):
    return replace(cpu_outer_config(ISA), tile_rows=84, tile_columns=columns)
