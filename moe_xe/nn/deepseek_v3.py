"""DeepSeek-V3: sigmoid scores, a bias and groups for the choice, and shared experts."""
from __future__ import annotations

import torch
from torch import nn

from ..ops.routing.route import route
from ..plan.choice.block_config import MoeConfig
from .parts import Experts, GatedMLP, MoeBlock, activation_of, sizes_of
from .router import Router

__all__ = ["DeepseekV3Block"]


class _Router(Router):
    """float32 logits, and the bias that only the choice sees."""

    def __init__(self, hidden_size: int, num_experts: int, *, hf_router: str, device, dtype):
        super().__init__(hidden_size, num_experts, hf_router=hf_router, device=device, dtype=dtype)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32, device=device))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states.float(), self.weight.float())


class DeepseekV3Block(MoeBlock):
    """gate: [E, H], and its e_score_correction_bias [E]. A token's experts come from the topk_groups of the num_groups
    whose two best experts have the highest sums. shared_experts: one MLP of shared_intermediate_size.
    """
    hf_class, hf_router = "DeepseekV3MoE", "deepseek_v3.DeepseekV3TopkRouter"

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, *,
                 shared_intermediate_size: int, num_groups: int = 1, topk_groups: int = 1, norm_topk_prob: bool = True,
                 routed_scaling_factor: float = 1.0, activation: str = "silu",
                 config: MoeConfig | None = None, autotune: bool = False, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        self.top_k, self.num_groups, self.topk_groups = top_k, num_groups, topk_groups
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.experts = Experts(num_experts, hidden_size, intermediate_size, activation=activation, config=config,
                               autotune=autotune, device=device, dtype=dtype)
        self.gate = _Router(hidden_size, num_experts, hf_router=self.hf_router, device=device, dtype=dtype)
        self.shared_experts = GatedMLP(hidden_size, shared_intermediate_size, device=device, dtype=dtype)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        gate = module.gate
        return dict(sizes_of(module.experts), shared_intermediate_size=module.shared_experts.down_proj.in_features,
                    top_k=gate.top_k, num_groups=gate.num_group, topk_groups=gate.topk_group,
                    norm_topk_prob=gate.norm_topk_prob, routed_scaling_factor=gate.routed_scaling_factor,
                    activation=activation_of(module.experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, H] -> the same."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_weights, topk_ids = route(
            self.gate(x), self.top_k, scoring="sigmoid", correction_bias=self.gate.e_score_correction_bias,
            num_groups=self.num_groups, topk_groups=self.topk_groups, renormalize=self.norm_topk_prob,
            scaling_factor=self.routed_scaling_factor)
        out = self.experts(x, topk_weights, topk_ids, shared=self.shared_experts.as_shared_expert())
        return out.view(hidden_states.shape)
