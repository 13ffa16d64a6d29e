"""Which rank has which experts: plain values, and the tables that ids are looked up in."""
from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from ..ops import checks
from ..plan.block.token_sort import MAX_EXPERTS

__all__ = ["Placement", "Physical"]


class Physical(NamedTuple):
    """For each of a token's slots, [T, k]: the physical expert and its rank, or, for none, numbers behind the last one.

    wrong: whether the id is no expert's and does not stand for none, either."""
    experts: torch.Tensor
    ranks: torch.Tensor
    wrong: torch.Tensor


@dataclass(frozen=True)
class Placement:
    """experts: of each rank, the global ids of its experts, in the order of its weights. An id may be there several times, each a replica.

    A physical expert is a place in all of them, rank by rank.
    """
    experts: tuple[tuple[int, ...], ...]

    @staticmethod
    def consecutive(counts: Sequence[int]) -> Placement:
        """Of each rank's number of experts, which follow those of lower ranks."""
        ends = list(accumulate(counts, initial=0))
        return Placement(tuple(tuple(range(begin, end)) for begin, end in zip(ends, ends[1:])))

    @staticmethod
    def even(num_experts: int, num_ranks: int) -> Placement:
        """As many on each rank as torch.chunk gives it, and DTensor's Shard(0)."""
        size = -(-num_experts // num_ranks)
        return Placement.consecutive([max(min(size, num_experts - rank * size), 0) for rank in range(num_ranks)])

    @staticmethod
    def of(experts_of_ranks, num_ranks: int, num_experts: int | None = None) -> Placement:
        """Of the argument of this name: for each rank its number of consecutive experts, or their global ids. Raises TypeError or
        ValueError."""
        name = "experts_of_ranks"
        if not isinstance(experts_of_ranks, Sequence) or isinstance(experts_of_ranks, str):
            raise TypeError(f"{name} must be a sequence with an entry for each rank, got {type(experts_of_ranks).__name__}")
        if len(experts_of_ranks) != num_ranks:
            raise ValueError(f"{name} must have an entry for each of the group's {num_ranks} ranks, got {len(experts_of_ranks)}")
        if all(isinstance(entry, Sequence) and not isinstance(entry, str) for entry in experts_of_ranks):
            placement = Placement(tuple(tuple(checks.check_count(f"{name}[{rank}]", expert, 0, MAX_EXPERTS) for expert in entry)
                                        for rank, entry in enumerate(experts_of_ranks)))
        else:
            placement = Placement.consecutive([checks.check_count(f"{name}[{rank}]", entry, 0, MAX_EXPERTS)
                                               for rank, entry in enumerate(experts_of_ranks)])
        ids = {expert for entry in placement.experts for expert in entry}
        expected = max(ids, default=-1) + 1 if num_experts is None else num_experts
        if not ids or ids != set(range(expected)):
            wrong = sorted(set(range(expected)) ^ ids)
            raise ValueError(f"{name} must have each expert from 0 to {expected - 1} at least once, and no others; "
                             f"see {wrong[:8] if wrong else 'no expert'}")
        return placement

    @property
    def sizes(self) -> tuple[int, ...]:
        """Experts of each rank."""
        return tuple(map(len, self.experts))

    def own(self, rank: int) -> range:
        """The physical experts of a rank."""
        first = sum(self.sizes[:rank])
        return range(first, first + self.sizes[rank])

    @property
    def num_physical(self) -> int:
        return sum(self.sizes)

    @property
    def num_experts(self) -> int:
        return len({expert for entry in self.experts for expert in entry})

    @functools.cached_property
    def digest(self) -> int:
        """A number below 2^31 that differs between placements."""
        return int.from_bytes(hashlib.sha256(repr(self.experts).encode()).digest()[:4], "big") >> 1

    def physical(self, topk_ids: torch.Tensor, rank: int) -> Physical:
        """Of global ids, [T, k]. An expert's replicas take turns, over the tokens and over the ranks that they come from."""
        is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
        make = _make_tables if is_traced else _tables       # what is kept must be real
        tables = make(self, topk_ids.device)
        ids = topk_ids.clamp(-1, self.num_experts)      # -1 is the tables' last entry
        wrong, ids = ids != topk_ids, ids.long()
        if tables.replicas.shape[1] == 1:
            experts = tables.replicas[ids, 0]
        else:
            turns = torch.arange(rank, rank + len(ids), device=ids.device)[:, None] % tables.num_replicas[ids]
            experts = tables.replicas[ids, turns]
        return Physical(experts, tables.ranks[experts], wrong)


class _Tables(NamedTuple):
    """replicas: [experts + 1, most], physical experts; num_replicas: [experts + 1]; ranks: [physical + 1]. Each with an entry for
    no expert."""
    replicas: torch.Tensor
    num_replicas: torch.Tensor
    ranks: torch.Tensor


def _make_tables(placement: Placement, device: torch.device) -> _Tables:
    places = [[] for _ in range(placement.num_experts)] + [[placement.num_physical]]
    ranks = []
    for rank, entry in enumerate(placement.experts):
        for expert in entry:
            places[expert].append(len(ranks))
            ranks.append(rank)
    most = max(map(len, places))
    replicas = [entry + entry[:1] * (most - len(entry)) for entry in places]
    return _Tables(*(torch.tensor(table, device=device) for table in (
        replicas, list(map(len, places)), [*ranks, len(placement.experts)])))


_tables = functools.lru_cache(maxsize=64)(_make_tables)
