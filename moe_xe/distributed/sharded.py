"""Experts' weights that are spread over ranks as DTensors."""
from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ..ops.lora.lora_moe import LoraAdapter
from ..quantized.weight import QuantizedWeight
from .group import group_of

__all__ = ["local_experts", "mapped"]

_OF_EXPERTS = "w13", "w2", "b13", "b2", "lora13", "lora2"


def local_experts(group, arguments: dict) -> tuple[object, dict]:
    """The group and a block's arguments, with this rank's tensors for DTensors of experts. Without a group, the group is w13's mesh.

    Differentiable. ValueError naming the argument for a DTensor that is not Shard(0) over the ranks of the group.
    """
    w13 = arguments["w13"]
    first = w13.codes if isinstance(w13, QuantizedWeight) else w13
    if group is None and isinstance(first, DTensor):
        group = first.device_mesh
    local = {name: mapped(DTensor, functools.partial(_local, name, group), arguments[name]) for name in _OF_EXPERTS if name in arguments}
    return group, arguments | local


def _local(name: str, group, tensor: DTensor) -> torch.Tensor:
    mesh = tensor.device_mesh
    if mesh.ndim != 1 or not tensor.placements[0].is_shard(0):
        raise ValueError(f"{name} must be Shard(0) over a DeviceMesh of one dimension, got {tensor.placements} over {mesh}")
    ranks, own = (dist.get_process_group_ranks(each) for each in (group_of(group), mesh.get_group()))
    if ranks != own:
        raise ValueError(f"{name} must be spread over the group's ranks, {ranks}, got ranks {own}")
    return tensor.to_local()


def mapped(kind: type, function, value):
    """A weight, bias or adapter with function(tensor) for each of its tensors of this kind."""
    if isinstance(value, LoraAdapter):
        return replace(value, a=mapped(kind, function, value.a), b=mapped(kind, function, value.b))
    return tree_map_only(kind, function, value)
