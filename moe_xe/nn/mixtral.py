"""Mixtral: as Qwen3-MoE, and the chosen experts' weights always sum to one."""
from __future__ import annotations

import torch
from torch import nn

from ..plan.choice.block_config import MoeConfig
from .parts import activation_of, sizes_of
from .qwen3_moe import Qwen3MoeBlock

__all__ = ["MixtralBlock"]


class MixtralBlock(Qwen3MoeBlock):
    """gate: [E, H]. The jitter noise of Mixtral's training is left out."""
    hf_class, hf_router = "MixtralSparseMoeBlock", "mixtral.MixtralTopKRouter"

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *,
                 activation: str = "silu", config: MoeConfig | None = None, autotune: bool = False, device=None,
                 dtype: torch.dtype | None = None):
        super().__init__(hidden_size, intermediate_size, num_experts, top_k, norm_topk_prob=True, activation=activation,
                         config=config, autotune=autotune, device=device, dtype=dtype)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        return dict(sizes_of(module.experts), top_k=module.gate.top_k, activation=activation_of(module.experts))
