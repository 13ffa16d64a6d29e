"""Llama-4: sigmoid weights on the experts' input, and a shared expert."""
from __future__ import annotations

import torch
from torch import nn

from ..ops.routing.route import route
from ..plan.choice.block_config import MoeConfig
from .parts import Experts, GatedMLP, MoeBlock, activation_of, sizes_of
from .router import Router

__all__ = ["Llama4Block"]


class Llama4Block(MoeBlock):
    """router: [E, H]; shared_expert: an MLP of shared_intermediate_size."""
    hf_class, hf_router = "Llama4TextMoe", "llama4.Llama4Router"

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *,
                 shared_intermediate_size: int, activation: str = "silu", config: MoeConfig | None = None,
                 autotune: bool = False, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.top_k = top_k
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation=activation, transposed=True,
                               weight_on_input=True, config=config, autotune=autotune, device=device, dtype=dtype)
        self.router = Router(hidden_size, num_experts, hf_router=self.hf_router, device=device, dtype=dtype)
        self.shared_expert = GatedMLP(hidden_size, shared_intermediate_size, device=device, dtype=dtype)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        return dict(sizes_of(module.experts, transposed=True), top_k=module.top_k,
                    shared_intermediate_size=module.shared_expert.down_proj.in_features,
                    activation=activation_of(module.experts))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., H] -> [tokens, H], and the router's logits [tokens, E]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = self.router(x)
        topk_weights, topk_ids = route(router_logits, self.top_k, scoring="sigmoid")
        return self.experts(x, topk_weights, topk_ids, shared=self.shared_expert.as_shared_expert()), router_logits
