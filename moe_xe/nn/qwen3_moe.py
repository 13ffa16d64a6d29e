"""Qwen3-MoE: softmax over all experts, then the best."""
from __future__ import annotations

import torch
from torch import nn

from ..ops.routing.route import route
from ..plan.choice.block_config import MoeConfig
from .parts import Experts, MoeBlock, activation_of, sizes_of
from .router import Router

__all__ = ["Qwen3MoeBlock"]


class Qwen3MoeBlock(MoeBlock):
    """gate: [E, H]; norm_topk_prob: the chosen experts' weights are divided by their sum."""
    hf_class, hf_router = "Qwen3MoeSparseMoeBlock", "qwen3_moe.Qwen3MoeTopKRouter"

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *,
                 norm_topk_prob: bool = True, activation: str = "silu", config: MoeConfig | None = None,
                 autotune: bool = False, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.gate = Router(hidden_size, num_experts, hf_router=self.hf_router, device=device, dtype=dtype)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation=activation, config=config,
                               autotune=autotune, device=device, dtype=dtype)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        return dict(sizes_of(module.experts), top_k=module.gate.top_k, norm_topk_prob=module.gate.norm_topk_prob,
                    activation=activation_of(module.experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, H] -> the same."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_weights, topk_ids = route(self.gate(x), self.top_k, renormalize=self.norm_topk_prob)
        return self.experts(x, topk_weights, topk_ids).view(hidden_states.shape)
