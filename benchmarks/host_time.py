"""Host time of small calls on the CPU device, beside a torch.mm in the same process: the least of many calls.

    python benchmarks/host_time.py [--calls 3000] [--rounds 3]
"""
import argparse
import time

import torch

import moe_xe


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3, help="repeats of all, of which the least counts")
    options = parser.parse_args()

    torch.set_default_dtype(torch.bfloat16)
    experts, size, top_k = 8, 64, 2
    x, w = torch.randn(8, size), torch.randn(size, size)
    a, weights = torch.randn(8, size), torch.randn(experts, size, size)
    counts = torch.ones(experts, dtype=torch.int32)
    token, w13, w2 = torch.randn(1, size), torch.randn(experts, 2 * size, size), torch.randn(experts, size, size)
    logits = torch.randn(1, experts)
    topk_weights, topk_ids = moe_xe.route(logits, top_k)
    sorted_out = torch.empty(8, size)
    calls = {
        "torch.mm": lambda: torch.mm(x, w),
        "grouped_gemm": lambda: moe_xe.grouped_gemm(a, weights, counts),
        "grouped_gemm, out": lambda: moe_xe.grouped_gemm(a, weights, counts, out=sorted_out),
        "route": lambda: moe_xe.route(logits, top_k),
        "sort_tokens": lambda: moe_xe.sort_tokens(topk_ids, experts, topk_weights=topk_weights),
        "fused_moe": lambda: moe_xe.fused_moe(token, w13, w2, topk_weights, topk_ids),
    }
    with torch.no_grad():
        rounds = [{name: least(call, options.calls) for name, call in calls.items()} for _ in range(options.rounds)]
    times = {name: min(one[name] for one in rounds) for name in calls}
    for name, microseconds in times.items():
        print(f"{name:20s} {microseconds:8.1f} us {microseconds / times['torch.mm']:6.1f} x torch.mm")


if __name__ == "__main__":
    main()
