"""The whole block with its experts spread over ranks."""
from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from ..ops import checks
from ..ops.block.call import BlockCall
from ..ops.block.training import shared_expert
from ..ops.lora.lora_moe import lora_calls, lora_moe
from ..ops.lora.training import LORA, LoraCall
from ..ops.plain import check_plain
from ..ops.weights import Weight
from ..plan.block.exchange import MAX_CHUNKS, preferred_chunks
from ..quantized.weight import QuantizedWeight
from .agreement import Header, telling, wants_gradient
from .capacity import padded_trip
from .group import device_of, group_of
from .message import RowFormat
from .placement import Placement
from .sharded import local_experts, mapped
from .trips import Trip, agreed_trips, split_tokens

__all__ = ["expert_parallel_moe"]

_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(lora_moe).parameters.items()
             if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "expert_map"}


def expert_parallel_moe(hidden_states: torch.Tensor, w13: Weight, w2: Weight, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *,
                        group, experts_of_ranks: Sequence | None = None, chunks: int | None = None, capacity: int | None = None,
                        wire: str | None = None, wire_back: str | None = None,
                        **options) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`fused_moe`, or with adapters `lora_moe`, of experts that are spread over the group's ranks; all call it together.

    hidden_states, topk_weights, topk_ids: of this rank's tokens, as `dispatch` takes them. w13, w2: of this rank's experts; rank r has the
    w13.shape[0] experts that follow those of lower ranks, or those that experts_of_ranks says (see `dispatch`). There may be none.
    chunks: the tokens are cut into so many, so that the experts compute those of one while others travel; ranks that say different numbers
    take the largest, None is moe_xe's choice. capacity, wire, wire_back: as in `dispatch`; with a capacity there is one chunk, and without
    experts_of_ranks all ranks have as many experts.
    group: as there. Experts' weights, biases and adapters may be DTensors, Shard(0) over the group; group=None then is w13's mesh.
    options: all of `lora_moe` but expert_map. The shared expert is every rank's own, and computes its tokens while rows travel.

    Differentiable as `lora_moe` is; see `dispatch` for backward, for what is raised where, and for when the host waits.

    Returns a new [T, H]: as from one process, but for the sums of each rank's experts, which are rounded to hidden_states' dtype on their
    way. With a capacity, that and overflow, an int32 scalar, see `Dispatched`.
    """
    group, options = local_experts(group, {"w13": w13, "w2": w2} | options)
    w13, w2 = options.pop("w13"), options.pop("w2")
    group = group_of(group)
    with telling(group, hidden_states) if capacity is None else nullcontext():
        device_of(group, "hidden_states", hidden_states)
        arguments, call, routed = _checked(hidden_states, w13, w2, topk_weights, topk_ids, options)
        x, num_local = call.hidden_states, _num_experts(w13)
        placement = None if experts_of_ranks is None else Placement.of(experts_of_ranks, group.size())
        if placement is not None and num_local != placement.sizes[group.rank()]:
            raise ValueError(f"w13 must have the {placement.sizes[group.rank()]} experts that experts_of_ranks gives rank {group.rank()}, "
                             f"got {num_local}")
        (num_tokens, hidden_size), top_k = x.shape, topk_ids.shape[1]
        there, back = RowFormat(hidden_size, x.dtype, top_k, top_k, wire), RowFormat(hidden_size, x.dtype, wire=wire_back)
        if chunks is not None:
            checks.check_count("chunks", chunks, 1, MAX_CHUNKS if capacity is None else 1)
        tensors = LORA.tensors(routed).values()
        if capacity is None:
            header = Header.of(tensors, there, back, num_local_experts=num_local, top_k=top_k,
                               chunks=chunks or preferred_chunks(num_tokens, top_k, num_local),
                               given=0 if placement is None else placement.digest)
    if capacity is None:
        trips = agreed_trips(group, header, placement, topk_ids, there, back)
    else:
        trips = [padded_trip(group, placement or Placement.consecutive([num_local] * group.size()), topk_ids, there, back, capacity,
                             wants_gradient(tensors))]
    out = _through_experts(trips, arguments, call)
    return out if capacity is None else (out, trips[0].overflow)


def _through_experts(trips: list[Trip], arguments: dict, call: BlockCall) -> torch.Tensor:
    """[T, H]. All rows leave before the first are waited for, and go back as soon as they are computed."""
    x, weights = call.hidden_states, call.topk_weights.float()
    tokens = split_tokens(x.shape[0], len(trips))
    leaving = [trip.start(*parts) for trip, *parts in zip(trips, x.split(tokens), weights.split(tokens))]
    shared = None if call.shared is None else shared_expert(call)
    returning = []
    for trip, started in zip(trips, leaving):
        rows, ids, weights = trip.arrive(started)
        if not trip.own:        # nothing is for the stand-in
            ids = torch.full_like(ids, -1)
        y = lora_moe(**arguments | {"hidden_states": rows, "topk_weights": weights, "topk_ids": ids, "shared": None})
        returning.append(trip.start_back(y))
    outs = [trip.arrive_back(started) for trip, started in zip(trips, returning)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if shared is None else out + shared


def _checked(hidden_states, w13, w2, topk_weights, topk_ids, options: dict) -> tuple[dict, BlockCall, LoraCall]:
    """All arguments of `lora_moe` by name, and what it makes of them, for its checks."""
    unknown = set(options) - set(_DEFAULTS)
    if unknown:
        raise TypeError(f"expert_parallel_moe takes group, experts_of_ranks, chunks, capacity, wire, wire_back and the options of lora_moe "
                        f"but expert_map, got {', '.join(sorted(unknown))}")
    arguments = {"hidden_states": hidden_states, "w13": w13, "w2": w2, "topk_weights": topk_weights, "topk_ids": topk_ids}
    arguments |= _DEFAULTS | options
    check_plain("expert_parallel_moe", arguments)
    if _num_experts(w13) == 0:
        arguments |= {name: _one_expert(arguments[name]) for name in ("w13", "w2", "b13", "b2", "lora13", "lora2")}
    return arguments, *lora_calls(**arguments, expert_map=None)


def _num_experts(w: Weight) -> int:
    """0 for what is no weight at all."""
    return w.shape[0] if isinstance(w, (torch.Tensor, QuantizedWeight)) and len(w.shape) == 3 else 1


def _one_expert(value):
    """Of weights of no expert, a stand-in that no row goes to: a rank without experts does what the others do. Their gradients are empty, and
    not missing: DTensors' gradients are there on all ranks."""
    return mapped(torch.Tensor, lambda tensor: torch.cat([tensor, tensor.new_empty(1, *tensor.shape[1:])]), value)
