"""Calls moe_xe while another thread rewrites what the kernels read: results may be wrong, but nothing outside is touched.

Memory behind what a kernel writes is a canary; a wilder access ends the process. Prints "intact".
"""
import threading
import time
from dataclasses import replace

import torch

import moe_xe
from moe_xe.device import queue_for
from moe_xe.ops.routing import token_sort
from moe_xe.ops.submission import Submission

SECONDS = 0.3
EXPERTS, TOKENS, TOP_K = 5, 20001, 3
CANARY = 1 << 16


def guarded(shape, dtype) -> torch.Tensor:
    """Uninitialised, in the middle of ones."""
    size = torch.Size(shape).numel()
    memory = torch.ones(size + 2 * CANARY, dtype=dtype)
    memories.append((memory, size))
    return memory[CANARY:CANARY + size].view(shape)


def intact() -> bool:
    return all((memory[:CANARY] == 1).all() and (memory[CANARY + size:] == 1).all() for memory, size in memories)


def while_rewritten(values: torch.Tensor, others: list[torch.Tensor], call) -> None:
    """Calls it for a while, and another thread copies the others into `values` in turn."""
    done = threading.Event()

    def rewrite():
        while not done.is_set():
            for other in others:
                values.copy_(other)

    thread = threading.Thread(target=rewrite)
    thread.start()
    end = time.monotonic() + SECONDS
    try:
        while time.monotonic() < end:
            call()
    finally:
        done.set()
        thread.join()


def sort(gpu: bool = False):
    ids = torch.zeros(TOKENS, TOP_K, dtype=torch.int32)
    # all valid, so that a row too many would be behind the last one
    some = [torch.randint(0, EXPERTS, ids.shape, dtype=torch.int32), torch.full_like(ids, EXPERTS - 1), torch.zeros_like(ids)]
    routing = token_sort.check_routing(ids, EXPERTS, num_shared=1)
    counts, pairs = guarded([EXPERTS + 1], torch.int32), guarded([routing.num_pairs], torch.int32)
    scales = guarded([routing.num_pairs], torch.float32)
    queue = queue_for(ids.device)

    def call():
        with Submission(queue, ids.device) as submission:
            token_sort.launch_sort(submission, routing, tokens_per_expert=counts.data_ptr(), row_pairs=pairs.data_ptr(),
                                   row_scales=scales.data_ptr())
        if not gpu:     # one snapshot of the ids, whichever
            total = int(counts.sum())
            assert (counts >= 0).all() and total <= routing.num_pairs, counts
            assert torch.equal(pairs[:total].unique(), pairs[:total].sort().values) and (pairs[total:] == -1).all()

    while_rewritten(ids, some, call)


def sort_of_gpu():
    """The GPU's kernel, on the CPU device."""
    target_of = token_sort.target_of
    token_sort.target_of = lambda facts: replace(target_of(facts), is_cpu=False, isa=None)
    sort(gpu=True)


def gemms():
    rows, n, k = 97, 102, 75
    a, w = torch.randn(rows, k), torch.randn(EXPERTS, n, k)
    out = guarded([rows, n], torch.float32)
    counts = torch.zeros(EXPERTS, dtype=torch.int32)
    some = [torch.randint(-5, 60, counts.shape, dtype=torch.int32) for _ in range(2)] + [
        torch.full_like(counts, 2**31 - 1), torch.full_like(counts, -2**31), torch.zeros_like(counts)]
    while_rewritten(counts, some, lambda: moe_xe.grouped_gemm(a, w, counts, out=out))
    counts.fill_(rows // EXPERTS)
    indices = torch.zeros(rows, dtype=torch.int32)
    some = [torch.randperm(rows, dtype=torch.int32), torch.randint(-2**31, 2**31 - 1, [rows], dtype=torch.int32)]
    while_rewritten(indices, some, lambda: moe_xe.grouped_gemm(a, w, counts, out=out, gather_indices=indices))
    while_rewritten(indices, some, lambda: moe_xe.grouped_gemm(a, w, counts, out=out, scatter_indices=indices))
    right, d = torch.randn(rows, n), guarded([EXPERTS, k, n], torch.float32)
    while_rewritten(indices, some, lambda: moe_xe.grouped_outer(a, right, counts, out=d, gather_indices_left=indices))


def block():
    """Few tokens: work-groups of one launch, which must not wait for what never comes."""
    tokens, hidden, size = 60, 50, 37
    ids = torch.zeros(tokens, TOP_K, dtype=torch.int32)
    some = [torch.randint(-1, EXPERTS + 1, ids.shape, dtype=torch.int32), torch.full_like(ids, EXPERTS - 1), torch.full_like(ids, -1)]
    x, w13, w2 = torch.randn(tokens, hidden), torch.randn(EXPERTS, 2 * size, hidden), torch.randn(EXPERTS, hidden, size)
    weights, out = torch.rand(tokens, TOP_K), guarded([tokens, hidden], torch.float32)
    workspace = guarded([moe_xe.fused_moe_workspace_bytes(tokens, TOP_K, hidden, size, EXPERTS, dtype=torch.float32)], torch.uint8)
    while_rewritten(ids, some, lambda: moe_xe.fused_moe(x, w13, w2, weights, ids, out=out, workspace=workspace))


memories: list[tuple[torch.Tensor, int]] = []
for what in (sort, gemms, block, sort_of_gpu):
    what()
print("intact" if intact() else "overwritten")
