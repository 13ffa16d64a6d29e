"""Tokens to the ranks of their experts, and back."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..ops import checks
from ..ops.plain import check_plain
from ..ops.routing.token_sort import check_routing
from ..plan.block.token_sort import MAX_EXPERTS
from .agreement import Header, telling, wants_gradient
from .capacity import padded_trip
from .group import device_of, group_of
from .message import RowFormat
from .placement import Placement
from .trips import Trip, agreed_trips

__all__ = ["Dispatched", "combine", "dispatch"]


@dataclass(frozen=True)
class Dispatched:
    """Rows that came to this rank, by the rank that they come from.

    x: [R, H]. topk_ids: int32 [R, k], the local expert of each of a row's slots, or the number of local experts for none, and topk_weights:
    float32 [R, k], as `fused_moe` takes them; with expand=True, None: a row has one expert, and from each rank rows come by expert.
    handle: what `combine` takes.
    With a capacity, R is ranks x capacity, where rows that stand for none have no experts, and overflow an int32 scalar, this rank's rows
    that had no place; else None.
    """
    x: torch.Tensor
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: Handle
    overflow: torch.Tensor | None = None

    @functools.cached_property
    def tokens_per_expert(self) -> torch.Tensor:
        """int32 [ranks, local experts]: how many of a rank's rows an expert has."""
        trip = self.handle.trip
        if trip.counts is not None:
            return trip.counts
        received, columns = trip.splits.received, len(trip.own) + 1
        ranks = torch.arange(len(received), device=self.x.device).repeat_interleave(
            torch.tensor(received, device=self.x.device), output_size=sum(received))
        places = ranks[:, None] * columns + self.topk_ids
        return torch.bincount(places.flatten(), minlength=len(received) * columns).view(-1, columns)[:, :-1].to(torch.int32).contiguous()


@dataclass(frozen=True)
class Handle:
    """The way back of what was dispatched."""
    trip: Trip
    topk_weights: torch.Tensor | None


def dispatch(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, *, num_experts: int, group, expand: bool = False,
             experts_of_ranks: Sequence | None = None, capacity: int | None = None, wire: str | None = None,
             wire_back: str | None = None) -> Dispatched:
    """Sends each token's row to the ranks that have its experts; all ranks of the group call it together, then `combine`.

    x: [T, H] bfloat16, float16 or float32; T may differ between ranks, or be 0. topk_ids: [T, k] int32 or int64, global ids, -1 or
    num_experts for no expert. topk_weights: [T, k], a float dtype. group: a ProcessGroup, a DeviceMesh of one dimension, or None for the
    default group.
    expand: False: a token goes to a rank once, however many of its experts are there, for `fused_moe` or `lora_moe` on what comes, and
      `combine` sums what ranks return. True: a row for each of a token's experts, for grouped GEMMs of one's own on
      tokens_per_expert; `combine` multiplies with the weights, in float32.
    experts_of_ranks: for each rank the number of its experts, which follow those of lower ranks, or the list of their global ids; an id
      that stands several times has replicas, which take turns. By default as torch.chunk spreads them, and DTensor's Shard(0).
    capacity: rows from each rank to each, for graphs: nothing is agreed on, as the host does not wait, and arguments must fit together on
      all ranks; k, H, types and options be the same. A token of which a row has no place, or with an id that is no expert's, is NaN in the
      end. Not with expand.
    wire, wire_back: "int8" or "fp8_e4m3": rows are sent as codes with a scale each, there and back; None: as they are, as gradients always.

    Differentiable in x and topk_weights. If any rank wants a gradient, backward has the same exchanges on all: it must run on all of them.
    The host waits for the device once, for the numbers of rows.

    Raises ValueError on all ranks where they differ in what must be the same or ids are wrong; TypeError or ValueError naming a wrong
    argument, and then RuntimeError on the others. A rank that stops or fails later is reported by the process group, within its timeout.
    """
    group = group_of(group)
    with telling(group, x) if capacity is None else nullcontext():
        device_of(group, "x", x)
        _check(x, topk_ids, topk_weights)
        checks.check_flags(expand=expand)
        num_experts = checks.check_count("num_experts", num_experts, 1, MAX_EXPERTS)
        placement = (Placement.even(num_experts, group.size()) if experts_of_ranks is None else
                     Placement.of(experts_of_ranks, group.size(), num_experts))
        slots = 0 if expand else topk_ids.shape[1]
        there, back = RowFormat(x.shape[1], x.dtype, slots, slots, wire), RowFormat(x.shape[1], x.dtype, wire=wire_back)
        if capacity is not None and expand:
            raise ValueError("capacity must be None with expand=True, whose rows lie one behind the other")
        if capacity is None:
            header = Header.of((x, topk_weights), there, back, num_local_experts=placement.sizes[group.rank()], top_k=topk_ids.shape[1],
                               num_experts=num_experts, given=placement.digest, expand=int(expand))
    if capacity is None:
        trip, = agreed_trips(group, header, placement, topk_ids, there, back)
    else:
        trip = padded_trip(group, placement, topk_ids, there, back, capacity, wants_gradient((x, topk_weights)))
    weights = topk_weights.float()
    rows, ids, row_weights = trip.arrive(trip.start(x, weights))
    if not expand:
        ids = torch.where((ids >= 0) & (ids < len(trip.own)), ids, len(trip.own))
    return Dispatched(rows, ids, row_weights, Handle(trip, weights if expand else None), trip.overflow)


def combine(y: torch.Tensor, handle: Handle) -> torch.Tensor:
    """Sends back what was made of a `Dispatched`'s rows, and sums it for each token, in float32 and in order of its slots.

    y: [R, H] in x's dtype, a row for each of them. Returns [T, H]; zeros for a token without experts. Differentiable in y. Raises TypeError
    or ValueError naming the argument; the other ranks then wait for this one, as long as the group's timeout says.
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"handle must be a Dispatched's handle, got {type(handle).__name__}")
    check_plain("combine", {"y": y})
    checks.check_tensor("y", y, 2, "[R, H]")
    trip = handle.trip
    shape = sum(trip.splits.received), trip.back.hidden_size
    if not checks.has_shape(y, shape) or y.dtype != trip.back.dtype:
        raise ValueError(f"y must be {str(trip.back.dtype).removeprefix('torch.')}{list(shape)}, got {checks.shape_of(y)}")
    return trip.arrive_back(trip.start_back(y), handle.topk_weights)


def _check(x, topk_ids, topk_weights) -> None:
    check_plain("dispatch", {"x": x, "topk_ids": topk_ids, "topk_weights": topk_weights})
    checks.check_tensor("x", x, 2, "[T, H]")
    checks.check_dtype("x", x.dtype)
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one column, got {checks.shape_of(x)}")
    checks.check_tensor("topk_weights", topk_weights, 2, "[T, k]")
    check_routing(topk_ids, 1, topk_weights=topk_weights)
    if topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids must have a row for each of the {x.shape[0]} rows of x, got {checks.shape_of(topk_ids)}")
    checks.check_same_device(x=x, topk_ids=topk_ids, topk_weights=topk_weights)
