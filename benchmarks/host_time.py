"""Host time of small calls on the CPU device, beside a torch.mm in the same process: the least of many calls.

    python benchmarks/host_time.py [--calls 3000] [--rounds 3]
"""
import argparse
import time

import torch

import moe_xe
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs

EXPERTS, SIZE, TOP_K = 8, 64, 2


def least(call, number: int) -> float:
    """Microseconds of the fastest of so many calls."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(number):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def small_calls() -> dict:
    """Name -> call; the first is what the others are compared with."""
    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    x, w = values(8, SIZE), values(SIZE, SIZE)
    rows, weights, counts = values(8, SIZE), values(EXPERTS, SIZE, SIZE), torch.ones(EXPERTS, dtype=torch.int32)
    inputs = INPUTS.flatten(Inputs(rows, weights, counts))
    token, w13, w2, logits = values(1, SIZE), values(EXPERTS, 2 * SIZE, SIZE), values(EXPERTS, SIZE, SIZE), values(1, EXPERTS)
    topk_weights, topk_ids = moe_xe.route(logits, TOP_K)
    ends, out = counts.cumsum(0).int(), values(8, SIZE)
    return {
        "torch.mm": lambda: torch.mm(x, w),
        "grouped_gemm": lambda: moe_xe.grouped_gemm(rows, weights, counts),
        "grouped_gemm, out": lambda: moe_xe.grouped_gemm(rows, weights, counts, out=out),
        "grouped_mm": lambda: moe_xe.grouped_mm(rows, weights, offs=ends),
        "route": lambda: moe_xe.route(logits, TOP_K),
        "sort_tokens": lambda: moe_xe.sort_tokens(topk_ids, EXPERTS, topk_weights=topk_weights),
        "fused_moe": lambda: moe_xe.fused_moe(token, w13, w2, topk_weights, topk_ids),
        "op grouped_gemm": lambda: torch.ops.moe_xe.grouped_gemm(*inputs, torch.bfloat16, "counts", "dynamic", "", False),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3, help="repeats of all, of which the least counts")
    options = parser.parse_args()
    calls = small_calls()
    rounds = [{name: least(call, options.calls) for name, call in calls.items()} for _ in range(options.rounds)]
    times = {name: min(one[name] for one in rounds) for name in calls}
    unit = next(iter(times.values()))
    for name, microseconds in times.items():
        print(f"{name:20s} {microseconds:8.1f} us {microseconds / unit:6.1f} x torch.mm")


if __name__ == "__main__":
    main()
