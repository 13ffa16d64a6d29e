"""What the prediction of a layer counts as kernels is what a call makes."""
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from moe_xe.distributed import expert_parallel_moe
from moe_xe.plan.block.expert_parallel import CHUNK_LAUNCHES, ONCE_LAUNCHES
from tests.distributed.processes import ranks
from tests.ops.block.case import HIDDEN, INTERMEDIATE

NOT_LAUNCHED = {"view", "slice", "split_with_sizes", "select", "unsqueeze", "alias", "reshape", "flatten", "new_empty", "new_empty_strided",
                "resolve_conj", "resolve_neg", "wait_tensor", "all_to_all_single", "all_gather_into_tensor", "fused_moe"}


class Launches(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._opname not in NOT_LAUNCHED
        return func(*args, **(kwargs or {}))


def launched(rank, chunks):
    """The third time, when all that is kept is there."""
    x, w13, w2 = torch.randn(60, HIDDEN), torch.randn(4, 2 * INTERMEDIATE, HIDDEN), torch.randn(4, HIDDEN, INTERMEDIATE)
    weights, ids = torch.rand(60, 3), torch.rand(60, 8).topk(3, dim=1).indices
    with torch.inference_mode():
        for _ in range(3):
            with Launches() as launches:
                expert_parallel_moe(x, w13, w2, weights, ids, group=dist.group.WORLD, chunks=chunks)
    return launches.number


@pytest.mark.parametrize("chunks", [1, 3])
def test_launches(chunks):
    for number in ranks(2).run(launched, chunks):
        assert number == pytest.approx(ONCE_LAUNCHES + chunks * CHUNK_LAUNCHES, rel=0.25)
