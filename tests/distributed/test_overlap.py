"""Experts compute while rows travel, in forward and in backward: time is that of the longer of the two, not their sum."""
from __future__ import annotations

import time

import torch

from moe_xe.bench.slow_link import slow_group
from moe_xe.distributed import block as block_module
from moe_xe.distributed import exchange, expert_parallel_moe
from tests.distributed.case import block, leaves, of_rank
from tests.distributed.processes import ranks

TOKENS, EXPERTS, CHUNKS = (24, 24, 0, 3), (2, 2, 1, 0), 3
COMPUTING, TRAVELLING = 0.2, 0.12       # seconds of each chunk, and of each of its ways, which together take a little longer


class _Slow(torch.autograd.Function):
    """Experts that take their time."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        return _compute(x, events)

    @staticmethod
    def backward(ctx, grad):
        return _compute(grad, ctx.events), None


def _compute(x, events):
    events.append("compute")
    time.sleep(COMPUTING)
    return x * 2


def on_rank(rank, arguments, chunks):
    """Events and seconds of forward and backward."""
    group = slow_group(latency=TRAVELLING)
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    leaves(own)
    expert_parallel_moe(**own, group=group, chunks=chunks)      # which compiles
    events, functional = [], torch.ops._c10d_functional
    original = block_module.lora_moe, exchange._exchange, functional.wait_tensor

    def wait(tensor):
        events.append("wait")
        return original[2](tensor)

    block_module.lora_moe = lambda hidden_states, **_: _Slow.apply(hidden_states, events)
    exchange._exchange = lambda *arguments: (events.append("start"), original[1](*arguments))[1]
    try:
        begin = time.monotonic()
        out = expert_parallel_moe(**own, group=group, chunks=chunks)
        middle = time.monotonic()
        functional.wait_tensor = wait       # not for what ranks agree on
        out.sum().backward()
        end = time.monotonic()
    finally:
        block_module.lora_moe, exchange._exchange, functional.wait_tensor = original
    return events, middle - begin, end - middle


def test_order_and_time():
    arguments = block(TOKENS, EXPERTS)
    for events, *seconds in ranks(4).run(on_rank, arguments, CHUNKS):
        forward, backward = events[:9], events[9:]
        assert forward == ["start"] * 3 + ["compute", "start"] * 3
        assert backward == ["start"] * 3 + ["wait", "compute", "start"] * 3 + ["wait"] * 3
        one_by_one = CHUNKS * (COMPUTING + 2 * TRAVELLING)
        assert max(seconds) < one_by_one - TRAVELLING, seconds
