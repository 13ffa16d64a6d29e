"""Trips with room for a fixed number of rows, which the host need not wait for: rows beyond it are counted, and their tokens are NaN."""
from __future__ import annotations

import torch
import torch.distributed as dist

from ..ops.checks import check_count
from ..ops.routing.token_sort import sort_tokens
from ..plan.block.token_sort import MAX_PAIRS
from .exchange import Splits
from .message import RowFormat
from .placement import Placement
from .rows import SentRows
from .trips import Trip, once_a_rank

__all__ = ["padded_trip"]


def padded_trip(group: dist.ProcessGroup, placement: Placement, topk_ids: torch.Tensor, there: RowFormat, back: RowFormat, capacity: int,
                recorded: bool) -> Trip:
    """capacity: rows from each rank to each. Nothing is agreed on: sizes and options must be equal on all ranks. Raises TypeError or
    ValueError naming capacity."""
    capacity = check_count("capacity", capacity, 0, MAX_PAIRS // group.size())
    ranks, rank, pairs = group.size(), group.rank(), topk_ids.numel()
    found = placement.physical(topk_ids, rank)
    groups = once_a_rank(found.ranks, ranks)
    counts, row_pairs, _ = sort_tokens(groups, ranks)
    places = torch.arange(capacity, device=groups.device)
    first = counts.cumsum(0) - counts
    sorted_places = torch.cat([row_pairs.long(), counts.new_full((1,), pairs, dtype=torch.int64)])
    places = sorted_places[torch.where(places < counts[:, None], places + first[:, None], pairs).flatten()]
    has_place = torch.zeros(pairs + 1, dtype=torch.bool, device=groups.device).index_fill_(0, places, True)[:pairs].view(groups.shape)
    lost = (((groups < ranks) & ~has_place) | found.wrong).any(1)
    tokens = (places // topk_ids.shape[1]).clamp(max=max(topk_ids.shape[0] - 1, 0))
    rows = SentRows(places, tokens, torch.where(has_place, groups, ranks), ranks)
    even = (capacity,) * ranks
    overflow = (counts - capacity).clamp(min=0).sum(dtype=torch.int32)
    return Trip(rows, Splits(even, even, group.group_name), there, back, recorded, placement.own(rank), found.experts, lost=lost,
                overflow=overflow)
