"""A rank's rows, there and back: what both `dispatch` and the whole block are made of."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ops.routing.token_sort import SortedTokens, sort_tokens
from .agreement import Counted, Header, agree
from .exchange import Splits, start, wait
from .message import RowFormat
from .placement import Physical, Placement
from .rows import SentRows

__all__ = ["Trip", "agreed_trips", "once_a_rank", "split_tokens"]


@dataclass(frozen=True)
class Trip:
    """The way of some tokens' rows to the ranks of their experts, and back.

    own: the physical experts of this rank. experts: int [T, top_k], each slot's physical expert; None where rows have one expert each and
    are sorted by it. counts: int32 [ranks, local experts], rows that come here; where they are sorted. lost: bool [T], tokens of which a
    row has no place, and overflow: int32 scalar, such rows; None where there is room for all.
    """
    rows: SentRows
    splits: Splits
    there: RowFormat
    back: RowFormat
    recorded: bool
    own: range
    experts: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    lost: torch.Tensor | None = None
    overflow: torch.Tensor | None = None

    def start(self, x: torch.Tensor, weights: torch.Tensor | None) -> tuple:
        """Sends the rows of x [T, H] and, with them, float32 weights [T, top_k] and ids."""
        if self.experts is None:
            return start(self.rows.of_tokens(x), None, None, self.there, self.splits, self.recorded)
        ids = self.rows.of_tokens(self.experts)
        if self.lost is not None:       # some rows stand for none
            ids = ids.masked_fill(self.rows.places[:, None] == self.rows.groups.numel(), -1)
        return start(self.rows.of_tokens(x), ids, self.rows.of_tokens(weights), self.there, self.splits, self.recorded)

    def arrive(self, started: tuple) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rows that came, [R, H]; their experts' ids here, outside [0, len(own)) for one elsewhere, and weights [R, top_k], or None."""
        rows, ids, weights = wait(started, self.there, self.splits)
        return rows, None if ids is None else ids - self.own.start, weights

    def start_back(self, y: torch.Tensor) -> tuple:
        """Sends what was made of the rows, [R, H]."""
        return start(y, None, None, self.back, self.splits.back, self.recorded)

    def arrive_back(self, started: tuple, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Their sums for each token, [T, H]; weights: float32 [T, top_k], of rows that have one expert each."""
        rows, *_ = wait(started, self.back, self.splits.back)
        if weights is None:
            out = self.rows.sums(rows)
        else:
            factors = weights.flatten().index_select(0, self.rows.places)
            out = self.rows.sums(rows.float() * factors[:, None]).to(rows.dtype)
        return out if self.lost is None else out.masked_fill(self.lost[:, None], float("nan"))


def split_tokens(num_tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk, as equal as they can be."""
    return [num_tokens * (chunk + 1) // chunks - num_tokens * chunk // chunks for chunk in range(chunks)]


@dataclass(frozen=True)
class _Chunk:
    groups: torch.Tensor
    experts: torch.Tensor
    sorted: SortedTokens


def agreed_trips(group: dist.ProcessGroup, header: Header, placement: Placement | None, topk_ids: torch.Tensor, there: RowFormat,
                 back: RowFormat) -> list[Trip]:
    """A trip for each chunk of the tokens, with room for just the rows that there are; one wait of the host."""
    ranks, rank, expand = group.size(), group.rank(), bool(header.expand)

    def count(ids: torch.Tensor, placement: Placement, chunks: int) -> Counted:
        found = placement.physical(ids, rank)
        parts = _sorted(found, split_tokens(len(ids), chunks), ranks, placement.num_physical if expand else None)
        counts = torch.stack([part.sorted.tokens_per_expert for part in parts])
        return Counted(counts, found.wrong.sum(dtype=torch.int32), parts)

    agreed = agree(group, topk_ids, header, placement, count)
    own, trips = agreed.placement.own(rank), []
    groups = [agreed.placement.own(other) if expand else range(other, other + 1) for other in range(ranks)]     # of each rank's rows
    for chunk, part in enumerate(agreed.kept):
        sent = tuple(sum(agreed.rows[rank][chunk][places.start:places.stop]) for places in groups)
        received = tuple(sum(rows[chunk][groups[rank].start:groups[rank].stop]) for rows in agreed.rows)
        places = part.sorted.row_pairs[:sum(sent)].long()
        rows = SentRows(places, places // topk_ids.shape[1], part.groups, agreed.gathered.shape[2])
        counts = agreed.gathered[:, chunk, own.start:own.stop].contiguous() if expand else None
        trips.append(Trip(rows, Splits(sent, received, group.group_name), there, back, agreed.recorded, own,
                          None if expand else part.experts, counts))
    return trips


def _sorted(found: Physical, tokens: Sequence[int], num_ranks: int, num_physical: int | None) -> list[_Chunk]:
    """Rows by rank, or, with a number of physical experts, by expert."""
    groups = once_a_rank(found.ranks, num_ranks) if num_physical is None else found.experts
    return [_Chunk(chunk, experts, sort_tokens(chunk, num_physical or num_ranks))
            for chunk, experts in zip(groups.split(tokens), found.experts.split(tokens))]


def once_a_rank(ranks: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Each slot's rank [T, top_k], but num_ranks for one that an earlier slot of its token has, too."""
    same = ranks[:, :, None] == ranks[:, None, :]
    return ranks.masked_fill(same.tril(-1).any(2), num_ranks)
