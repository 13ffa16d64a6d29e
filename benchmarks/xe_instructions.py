"""Instructions of the grouped GEMM as Xe machine code, executed by xesim: for each thousand useful multiply-adds, and of a tile's ends.

    PYTHONPATH=.:tools python benchmarks/xe_instructions.py

Default configurations of an Arc B580 and its 20 work-groups; results are checked. xesim has no caches and no time, so a first launch and a
later one execute the same instructions. Needs ocloc (tools/install-ocloc) and g++.
"""
from __future__ import annotations

from moe_xe.bench.workloads import recorded_layers
from moe_xe.isa import counts
from moe_xe.plan.model.cost import variant_of
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, WeightLayout
from tests.xe.case import Case, default_config

CORES = 20
LOADS = {
    "recorded layer 0, N = 512, K = 256": (recorded_layers()[0], 512, 256),
    "recorded layer 12, N = 512, K = 256": (recorded_layers()[12], 512, 256),
    "8 experts x 256 rows, N = 1024, K = 512": ([256] * 8, 1024, 512),
    "16 experts x 3 rows, N = 1024, K = 512": ([3] * 16, 1024, 512),
}


def per_thousand(rows: list[int], n: int, k: int, layout: WeightLayout) -> float:
    """Instructions of all sub-groups for 1000 useful multiply-adds."""
    problem = GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16, layout)
    case = Case(problem, rows)
    stats = case.launch(default_config(problem, n, k, sum(rows), len(rows)), CORES)
    case.check()
    return 1e3 * stats.total / (sum(rows) * n * k)


def main() -> None:
    print("| instructions for 1000 useful multiply-adds | [E, N, K] | [E, K, N] |\n|---|---|---|")
    for name, load in LOADS.items():
        cells = [f"{per_thousand(*load, layout):.2f}" for layout in (WeightLayout.enk, WeightLayout.ekn)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("\n| instructions of a 32 x 64 sub-group tile outside the K loop | bmg | pvc |\n|---|---|---|")
    for problem in counts.problems():
        bmg, pvc = (entry["tile"] for entry in counts.count(problem, (32, 64), ("bmg", "pvc")))
        print(f"| {variant_of(problem)} | {bmg} | {pvc} |", flush=True)


if __name__ == "__main__":
    main()
