"""Rows that leave a rank, and their sums for each token when they are back: each is the other's backward."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.routing import token_sort as _defines_combine      # noqa: F401

__all__ = ["SentRows"]


@dataclass(frozen=True)
class SentRows:
    """places: int64 [n], of each row that is sent its pair, token * top_k + slot; or the number of pairs, for a row that stands for none.
    tokens: int [n], its token; any for a row that stands for none.

    groups: int [T, top_k], of each pair the group of rows it is in, or num_groups for a pair that has no row of its own.
    """
    places: torch.Tensor
    tokens: torch.Tensor
    groups: torch.Tensor
    num_groups: int

    def of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[T, C] -> [n, C]. Differentiable."""
        return _Gather.apply(values, self.places, self.tokens, self.groups, self.num_groups)

    def sums(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] -> [T, C]: in order of slots, in float32, rounded once. Differentiable."""
        return _Sum.apply(rows, self.places, self.tokens, self.groups, self.num_groups)


def _gather(values: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    if values.shape[0] == 0:        # rows stand for none
        return values.new_zeros(tokens.shape[0], values.shape[1])
    return values.index_select(0, tokens)


def _sum(rows: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, groups: torch.Tensor, num_groups: int) -> torch.Tensor:
    num_pairs = groups.numel()
    of_pairs = rows.new_empty(num_pairs + 1, rows.shape[1]).index_copy_(0, places, rows)       # the last is of rows that stand for none
    return torch.ops.moe_xe.combine(of_pairs[:num_pairs], groups, num_groups, None, 0, rows.dtype)


def _function(forward, backward) -> type[torch.autograd.Function]:
    """Of functions (values, places, tokens, groups, num_groups), each the other's backward."""
    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, places, tokens, groups, num_groups):
            ctx.save_for_backward(places, tokens, groups)
            ctx.num_groups = num_groups
            return forward(values, places, tokens, groups, num_groups)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad, *ctx.saved_tensors, ctx.num_groups), None, None, None, None

    return Rows


_Gather, _Sum = _function(_gather, _sum), _function(_sum, _gather)
