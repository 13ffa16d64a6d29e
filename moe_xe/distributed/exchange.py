"""Rows between ranks: an exchange starts, something else runs, and it is waited for; in backward, too.

The backward of waiting is starting, and the backward of starting is waiting. Autograd runs what was called last first, so what ran between
the two in forward has its backward between them as well. What travels is not differentiable itself, so a link, a tensor without memory of
its own, stands for it in autograd's graph: it has the shape of the message that gradients come back in.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from .message import RowFormat

__all__ = ["Splits", "start", "wait"]


@dataclass(frozen=True)
class Splits:
    """Rows to each rank of the group and from each."""
    sent: tuple[int, ...]
    received: tuple[int, ...]
    group_name: str

    @property
    def back(self) -> Splits:
        return Splits(self.received, self.sent, self.group_name)


def start(rows: torch.Tensor, ids: torch.Tensor | None, weights: torch.Tensor | None, format: RowFormat, splits: Splits,
          recorded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sends rows [n, H], with ids and weights [n, k] if the format has them, and returns at once what `wait` takes.

    recorded: autograd sees it, whatever the tensors require: all ranks have the same exchanges in backward, or they would wait for each
    other.
    """
    witness = rows.new_empty(0, requires_grad=True) if recorded else None
    return _Start.apply(rows, weights, ids, witness, format, splits)


def wait(started: tuple[torch.Tensor, torch.Tensor], format: RowFormat, splits: Splits) -> tuple[torch.Tensor, ...]:
    """The rows that came, and their ids and weights, or None."""
    return _Wait.apply(*started, format, splits)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, ids, witness, format, splits):
        ctx.format, ctx.splits = format.of_gradients, splits
        ctx.set_materialize_grads(False)
        received = _exchange(format.pack(rows, ids, weights), splits)
        ctx.mark_non_differentiable(received)
        return received, received.new_empty_strided((rows.shape[0], ctx.format.words), (0, 0))

    @staticmethod
    def backward(ctx, _, link):
        rows, _, weights = (None,) * 3 if link is None else ctx.format.unpack(torch.ops._c10d_functional.wait_tensor(link))
        return rows, weights, None, None, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, link, format, splits):
        rows, ids, weights = format.unpack(torch.ops._c10d_functional.wait_tensor(received))
        ctx.format, ctx.splits = format.of_gradients, splits
        if ids is not None:
            ctx.mark_non_differentiable(ids)
        return rows, ids, weights

    @staticmethod
    def backward(ctx, rows, _, weights):
        return None, _exchange(ctx.format.pack(rows, None, weights), ctx.splits.back), None, None


def _exchange(message: torch.Tensor, splits: Splits) -> torch.Tensor:
    """What comes, a tensor that is to be waited for before anything reads it."""
    return torch.ops._c10d_functional.all_to_all_single(message, list(splits.received), list(splits.sent), splits.group_name)
