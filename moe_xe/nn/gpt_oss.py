"""gpt-oss: softmax over the chosen experts, biases everywhere, clamped gates interleaved with their up values."""
from __future__ import annotations

import torch
from torch import nn

from ..ops.routing.route import route
from ..plan.choice.block_config import MoeConfig
from .parts import Experts, MoeBlock, sizes_of
from .router import Router

__all__ = ["GptOssBlock"]


class GptOssBlock(MoeBlock):
    """router: [E, H] and [E]; alpha, limit: of the experts' gates."""
    hf_class, hf_router = "GptOssMLP", "gpt_oss.GptOssTopKRouter"

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *, alpha: float = 1.702,
                 limit: float = 7.0, config: MoeConfig | None = None, autotune: bool = False, device=None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.top_k = top_k
        self.router = Router(hidden_size, num_experts, hf_router=self.hf_router, bias=True, device=device, dtype=dtype)
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, activation="swiglu_oai", alpha=alpha, limit=limit,
            interleaved=True, transposed=True, bias=True, config=config, autotune=autotune, device=device, dtype=dtype)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        return dict(sizes_of(module.experts, transposed=True), top_k=module.router.top_k, alpha=module.experts.alpha,
                    limit=module.experts.limit)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, sequence, H] -> the same, and the chosen experts' weights [batch * sequence, top_k]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_weights, topk_ids = route(self.router(x), self.top_k, scoring="topk_softmax")
        return self.experts(x, topk_weights, topk_ids).view(hidden_states.shape), topk_weights.to(x.dtype)
