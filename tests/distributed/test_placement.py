"""Which rank has which experts, as plain values."""
from __future__ import annotations

import pytest
import torch

from moe_xe.distributed.placement import Placement

REPLICAS = Placement.of([[0, 2], [1, 0], [], [0, 2]], 4)


def test_consecutive():
    assert Placement.of([2, 0, 3], 3).experts == ((0, 1), (), (2, 3, 4)) == Placement.of([[0, 1], [], [2, 3, 4]], 3).experts


@pytest.mark.parametrize("num_experts, num_ranks", [(8, 4), (10, 4), (3, 4), (1, 1)])
def test_even_is_as_torch_chunks(num_experts, num_ranks):
    chunks = [tuple(chunk.tolist()) for chunk in torch.arange(num_experts).chunk(num_ranks)]
    assert Placement.even(num_experts, num_ranks).experts == (*chunks, *[()] * (num_ranks - len(chunks)))


def test_replicas():
    """Expert 0 is at the places 0, 3 and 4, expert 2 at 1 and 5."""
    ids = torch.tensor([[0, 2], [0, 1], [2, 0], [0, -1], [3, 0]])
    found = REPLICAS.physical(ids, rank=1)
    assert found.experts.tolist() == [[3, 5], [4, 2], [5, 0], [3, 6], [6, 4]]
    assert found.ranks.tolist() == [[1, 3], [3, 1], [3, 0], [1, 4], [4, 3]]
    assert not found.wrong.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_that_are_no_experts(dtype):
    ids = torch.tensor([[-2, -1, 0, 2, 3, 4, 2**31 - 1]], dtype=dtype)
    found = REPLICAS.physical(ids, rank=0)
    assert found.wrong.tolist() == [[True, False, False, False, False, True, True]]
    assert (found.experts[0] < 6).tolist() == [False, False, True, True, False, False, False]


def test_digest_tells_placements_apart():
    placements = [Placement.of(experts, 2) for experts in ([2, 1], [1, 2], [[0, 1], [2, 0]], [[0, 1], [0, 2]])]
    assert len({placement.digest for placement in placements}) == 4 and all(0 <= placement.digest < 2**31 for placement in placements)


@pytest.mark.parametrize("experts, message", [
    ([1], "experts_of_ranks must have an entry for each of the group's 2 ranks, got 1"),
    ("ab", "experts_of_ranks must be a sequence with an entry for each rank, got str"),
    ([1, -1], r"experts_of_ranks\[1\] must be from 0 to"),
    ([[0], ["a"]], r"experts_of_ranks\[1\] must be an int, got str"),
    ([0, 0], "each expert from 0 to -1 at least once, and no others; see no expert"),
    ([[0], [2]], r"each expert from 0 to 2 at least once, and no others; see \[1\]"),
])
def test_bad_input(experts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Placement.of(experts, 2)


def test_experts_that_are_not_there():
    with pytest.raises(ValueError, match=r"from 0 to 3 at least once, and no others; see \[3\]"):
        Placement.of([2, 1], 2, num_experts=4)
