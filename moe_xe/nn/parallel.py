"""Experts that are spread over the ranks of a mesh."""
from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .lora import LoraExperts
from .parts import Experts

__all__ = ["ExpertParallel"]


class ExpertParallel(ParallelStyle):
    """The style of `Experts` and `LoraExperts` for torch's parallelize_module: each rank of the mesh has a part of the experts.

    mesh: of one dimension. Parameters, and the codes and scales of quantised weights, become DTensors with Shard(0), under their names; the
    forward is `moe_xe.distributed.expert_parallel_moe`, which all ranks call together, each with tokens of its own.
    chunks, wire, wire_back: as there.

    Parameters' values are those of the mesh's first rank, with parallelize_module's src_data_rank=None each rank's own, as quantised weights'.
    TypeError for another module, ValueError for a mesh of several dimensions.
    """

    def __init__(self, *, chunks: int | None = None, wire: str | None = None, wire_back: str | None = None):
        self.exchange = dict(chunks=chunks, wire=wire, wire_back=wire_back)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (Experts, LoraExperts)):
            raise TypeError(f"ExpertParallel is for moe_xe.nn.Experts and LoraExperts, got {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"mesh must have one dimension, got {device_mesh}; take the one of the experts, mesh[name]")
        for part in module.modules():
            if isinstance(part, (Experts, LoraExperts)):
                part.exchange = self.exchange
            for name, parameter in part.named_parameters(recurse=False):
                sharded = _sharded(parameter, device_mesh, self.src_data_rank)
                part.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
            for name, buffer in part.named_buffers(recurse=False):
                part.register_buffer(name, _sharded(buffer, device_mesh, None))      # of quantised weights; gloo sends no float8
        return module


def _sharded(tensor: torch.Tensor, mesh: DeviceMesh, source: int | None) -> DTensor:
    return tensor if isinstance(tensor, DTensor) else distribute_tensor(tensor.detach(), mesh, [Shard(0)], src_data_rank=source)
