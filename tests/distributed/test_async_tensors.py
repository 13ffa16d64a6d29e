"""Every op waits for what a collective returns before it is done, an AsyncCollectiveTensor, whose memory is not there until then."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.utils._pytree import tree_leaves

from tests.distributed.processes import ranks
from tests.ops.every_op import every_op

RANKS = 2


def from_next_rank(tensor: torch.Tensor) -> AsyncCollectiveTensor:
    rank, rows = dist.get_rank(), tensor.shape[0]
    received, sent = ([rows if other == peer % RANKS else 0 for other in range(RANKS)] for peer in (rank + 1, rank - 1))
    result = all_to_all_single(tensor.contiguous(), received, sent, dist.group.WORLD)
    assert type(result) is AsyncCollectiveTensor and not result.completed
    return result


def wrong_ops(rank: int) -> list[str]:
    torch.manual_seed(0)        # all ranks have the same
    wrong = []
    for op, case in every_op().items():
        travelling = case.mapped(lambda name, tensor: from_next_rank(tensor))
        expected, actual = tree_leaves(case.mapped(lambda name, tensor: tensor.clone())()), tree_leaves(travelling())
        if not all(map(torch.equal, actual, expected)):
            wrong.append(op)
        wrong += [f"{op}: {name}" for name, tensor in travelling.tensors() if not tensor.completed and name != "workspace"]
        for _, tensor in travelling.tensors():
            tensor.wait()
    return wrong


def test_ops_wait():
    assert ranks(RANKS).run(wrong_ops) == [[]] * RANKS
