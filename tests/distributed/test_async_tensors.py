"""Every op waits for what a collective returns before it is done, an AsyncCollectiveTensor, whose values are not there until then."""
from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.utils._pytree import tree_leaves

from tests.distributed.processes import ranks
from tests.ops.every_op import every_op

RANKS = 2


class Late(dist.ProcessGroup):
    """Each rank gets what it sends, when it waits for that."""

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:
        return "late"

    def alltoall_base(self, received, sent, *_):
        received.view(torch.uint8).fill_(0x7e)
        return Arrival(received, sent)


class Arrival(dist._Work):
    def __init__(self, received, sent):
        super().__init__()
        self._received, self._sent = received, sent

    def wait(self, *timeout) -> bool:
        self._received.copy_(self._sent)
        return True


@functools.cache
def late_group() -> dist.ProcessGroup:
    dist.Backend.register_backend("late", lambda store, rank, size, timeout: Late(rank, size), devices=["cpu"])
    return dist.new_group(backend="late")


def travelling(name: str, tensor: torch.Tensor) -> AsyncCollectiveTensor:
    rows = [tensor.shape[0], 0]
    result = all_to_all_single(tensor.clone(memory_format=torch.contiguous_format), rows, rows, late_group())
    assert type(result) is AsyncCollectiveTensor
    return result


def wrong_ops(rank: int) -> list[str]:
    wrong = []
    for op, case in every_op().items():
        expected, actual = (tree_leaves(case.mapped(function)()) for function in (lambda name, tensor: tensor.clone(), travelling))
        if len(actual) != len(expected) or not all(map(torch.equal, actual, expected)):
            wrong.append(op)
    return wrong


def test_ops_wait():
    assert ranks(RANKS).run(wrong_ops) == [[]] * RANKS
