"""Rows that leave a rank, and their sums for each token when they are back: each is the other's backward."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.routing.token_sort import combine

__all__ = ["SentRows"]


@dataclass(frozen=True)
class SentRows:
    """pairs: int32 [n], of each row that is sent the pair token * top_k + slot, or -1 for a row that stands for none.

    groups: int [T, top_k], of each pair the group of rows it is in, or num_groups for a pair that has no row of its own.
    """
    pairs: torch.Tensor
    groups: torch.Tensor
    num_groups: int

    @property
    def tokens(self) -> torch.Tensor:
        """[n]; 0 where a row stands for none."""
        return self.pairs.clamp(min=0) // self.groups.shape[1]

    def of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [n, C]. Differentiable."""
        return _Gather.apply(values, self)

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] -> [T, C]: in order of slots, in float32, rounded once. Differentiable."""
        return _Sum.apply(rows, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, sent):
        ctx.sent = sent
        return _gather(values, sent)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, ctx.sent), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sent):
        ctx.sent = sent
        return _sum(rows, sent)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.sent), None


def _gather(values: torch.Tensor, sent: SentRows) -> torch.Tensor:
    if values.shape[0] == 0:        # rows that stand for no token
        return values.new_zeros(sent.pairs.shape[0], values.shape[1])
    return values.index_select(0, sent.tokens)


def _sum(rows: torch.Tensor, sent: SentRows) -> torch.Tensor:
    num_pairs = sent.groups.numel()
    places = torch.where(sent.pairs < 0, num_pairs, sent.pairs).long()      # one more place, for rows that stand for none
    of_pairs = rows.new_empty(num_pairs + 1, rows.shape[1]).index_copy_(0, places, rows)
    return combine(of_pairs[:num_pairs], sent.groups, sent.num_groups)
