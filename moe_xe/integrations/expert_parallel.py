"""Transformers' expert parallelism, ``ep_implementation="moe_xe"``, on `moe_xe.distributed`. Registers itself."""
from __future__ import annotations

import torch
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from ..distributed import combine, dispatch

__all__ = ["ExpertParallel"]


class ExpertParallel(EPImplementation):
    """A token goes to each rank of ep_mesh once, however many of its experts are there, and their weighted sum comes back.

    experts: a module with ``experts_implementation="moe_xe"``, ValueError for others: in training, those leave a rank without rows out of
    backward, and the other ranks waiting for it. Ranks of tp_mesh hold the same tokens: each sends a part of them.
    """

    def __init__(self, experts: torch.nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self._config = experts.config
        self._check_implementation()

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        self._check_implementation()
        tokens = [self._part_of(tensor) for tensor in (hidden_states, top_k_index, top_k_weights)]
        sent = dispatch(*tokens, num_experts=self.num_local_experts * self.ep_mesh.size(), group=self.ep_mesh)
        out = combine(self.experts_forward(sent.x, sent.topk_ids, sent.topk_weights), sent.handle)
        return self._whole_of(out, hidden_states.shape)

    def _check_implementation(self) -> None:
        if (implementation := self._config._experts_implementation) != "moe_xe":
            raise ValueError(f'experts_implementation must be "moe_xe" for ep_implementation="moe_xe", got {implementation!r}')

    def _part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.tp_mesh.size() == 1:
            return tensor
        whole = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def _whole_of(self, part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if self.tp_mesh.size() == 1:
            return part
        return DTensor.from_local(part, self.tp_mesh, [Shard(0)], shape=shape, stride=(shape[1], 1), run_check=False).full_tensor()


EPImplementationInterface.register("moe_xe", ExpertParallel)
