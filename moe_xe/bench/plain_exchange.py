"""Expert parallelism as it is written down in torch alone: a row for each pair of token and expert, permutations, grouped_mm."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

_c10d = torch.ops._c10d_functional


class Dispatched(NamedTuple):
    """rows: by local expert, tokens_per_expert of each; order: of the pairs that were sent; places: of the rows that came; and the splits."""
    rows: torch.Tensor
    tokens_per_expert: torch.Tensor
    order: torch.Tensor
    places: torch.Tensor
    sent: list[int]
    received: list[int]


def exchange(rows: torch.Tensor, received: list[int], sent: list[int], group) -> torch.Tensor:
    return _c10d.wait_tensor(_c10d.all_to_all_single(rows, received, sent, group.group_name))


def dispatch(x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, group) -> Dispatched:
    """x: [T, H]; topk_ids: [T, k]. Each rank has as many of the experts."""
    ranks = group.size()
    counts = torch.bincount(topk_ids.flatten(), minlength=num_experts)
    local = num_experts // ranks
    table = exchange(counts, [local] * ranks, [local] * ranks, group).view(ranks, local)
    sent, received = torch.stack([counts.view(ranks, local).sum(1), table.sum(1)]).tolist()
    order = topk_ids.flatten().argsort(stable=True)
    rows = exchange(x[order // topk_ids.shape[1]], received, sent, group)
    experts = torch.arange(local, device=x.device).repeat(ranks).repeat_interleave(table.flatten(), output_size=sum(received))
    places = experts.argsort(stable=True)
    return Dispatched(rows[places], table.sum(0), order, places, sent, received)


def experts(rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """[R, H] by expert; w13: [E, 2I, H], w2: [E, H, I]; silu."""
    if not len(rows):
        return rows
    offs = tokens_per_expert.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(rows, w13.transpose(1, 2), offs=offs).chunk(2, 1)
    return F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=offs)


def combine(y: torch.Tensor, found: Dispatched, topk_weights: torch.Tensor, group) -> torch.Tensor:
    """y: [R, H] by expert -> [T, H]."""
    back = torch.empty_like(y)
    back[found.places] = y
    back = exchange(back, found.sent, found.received, group)
    of_pairs = torch.empty_like(back)
    of_pairs[found.order] = back
    return torch.bmm(topk_weights.to(y.dtype)[:, None], of_pairs.view(*topk_weights.shape, y.shape[1]))[:, 0]
