"""Transformers' MoE blocks with moe_xe's grouped GEMM in place of the experts' loop; parameters are shared, not copied."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...plan.gemm.config import TileConfig
from ..interface import grouped_gemm
from .moe_ops import calculate_topk, get_routing_indices, permute, unpermute

__all__ = ["Llama4MoeFusedGroupedGEMMBlock", "Qwen3MoeFusedGroupedGEMMBlock"]


class _FusedGroupedGEMMBlock(nn.Module):
    """What the blocks have in common: the options, and the routed experts by two grouped GEMMs.

    permute_x: tokens are sorted by expert in the first GEMM's loads. permute_y: and put back into token order in the second
    GEMM's stores. fuse_mul_post: and multiplied by their weights there (needs permute_y, and is for inference). autotune,
    kernel_configs_fwd (of the first and of the second GEMM): see `moe_xe.grouped_gemm.interface`.
    """

    def __init__(self, experts: nn.Module, permute_x: bool = True, permute_y: bool = True, fuse_mul_post: bool = False,
                 autotune: bool = False, kernel_configs_fwd: tuple[TileConfig | None, TileConfig | None] = (None, None)):
        super().__init__()
        if fuse_mul_post and not permute_y:
            raise ValueError("fuse_mul_post needs permute_y=True: the weights are in token order")
        self.experts = experts
        self.permute_x, self.permute_y, self.fuse_mul_post = permute_x, permute_y, fuse_mul_post
        self.autotune, self.kernel_configs_fwd = autotune, kernel_configs_fwd

    @classmethod
    def from_hf(cls, moe_block: nn.Module, **options):
        """The block with the parameters of Transformers' (the same objects); options as in the constructor.

        Raises TypeError unless it has the submodules of Transformers' block, with experts as 3D parameters.
        """
        for name in cls.hf_names:
            if not _has(moe_block, name):
                raise TypeError(f"moe_block must be Transformers' {cls.hf_class}, with {', '.join(cls.hf_names)}; "
                                f"{type(moe_block).__name__} has no {name}")
        return cls(moe_block, **options)

    def _run_experts(self, x: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, topk_ids: torch.Tensor,
                     output_weights: torch.Tensor | None) -> torch.Tensor:
        """[tokens, H] -> [tokens, H] for gate_up_proj [E, 2I, H], down_proj [E, H, I], ids and weights [tokens, topk]."""
        num_tokens, topk = topk_ids.shape
        m_sizes, gather_indices = get_routing_indices(topk_ids, gate_up_proj.shape[0])
        first_config, second_config = self.kernel_configs_fwd
        if not self.permute_x:
            x = permute(x, gather_indices, topk)
        h = grouped_gemm(x, gate_up_proj, m_sizes, topk, gather_indices, permute_x=self.permute_x,
                         kernel_config_fwd=first_config, autotune=self.autotune, is_first_gemm=True)
        gate, up = h.chunk(2, dim=-1)
        fuse_mul_post = self.fuse_mul_post and output_weights is not None
        y = grouped_gemm(self.experts.act_fn(gate) * up, down_proj, m_sizes, topk, gather_indices,
                         permute_y=self.permute_y, topk_weights=output_weights, fuse_mul_post=fuse_mul_post,
                         kernel_config_fwd=second_config, autotune=self.autotune, is_first_gemm=False)
        if not self.permute_y:
            y = unpermute(y, gather_indices)
        y = y.view(num_tokens, topk, -1)
        if output_weights is not None and not fuse_mul_post:
            y = y * output_weights[..., None]
        return y.sum(1)


class Qwen3MoeFusedGroupedGEMMBlock(_FusedGroupedGEMMBlock):
    """Qwen3MoeSparseMoeBlock: softmax routing, weights on the experts' output. [batch, seq, H] -> [batch, seq, H]."""
    hf_class = "Qwen3MoeSparseMoeBlock"
    hf_names = ("gate.weight", "gate.top_k", "gate.norm_topk_prob", "experts.gate_up_proj", "experts.down_proj")

    def __init__(self, moe_block: nn.Module, **options):
        super().__init__(moe_block.experts, **options)
        self.gate = moe_block.gate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk_weights, topk_ids = calculate_topk(F.linear(x, self.gate.weight), self.gate.top_k,
                                                renormalize=self.gate.norm_topk_prob)
        y = self._run_experts(x, self.experts.gate_up_proj, self.experts.down_proj, topk_ids, topk_weights.to(x.dtype))
        return y.view(hidden_states.shape)


class Llama4MoeFusedGroupedGEMMBlock(_FusedGroupedGEMMBlock):
    """Llama4TextMoe: sigmoid weights on the experts' input, and a shared expert.

    [batch, seq, H] or [tokens, H] -> ([tokens, H], router logits [tokens, E]). fuse_mul_post has nothing to multiply here.
    """
    hf_class = "Llama4TextMoe"
    hf_names = ("router.weight", "router.top_k", "shared_expert", "experts.gate_up_proj", "experts.down_proj")

    def __init__(self, moe_block: nn.Module, **options):
        super().__init__(moe_block.experts, **options)
        self.router, self.shared_expert = moe_block.router, moe_block.shared_expert

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits = F.linear(x, self.router.weight)
        topk_weights, topk_ids = calculate_topk(router_logits, self.router.top_k, scoring="sigmoid")
        num_tokens, topk = topk_ids.shape
        # each choice scales its token by another weight, so that it becomes a token of its own with one expert
        scaled = (x[:, None] * topk_weights.to(x.dtype)[..., None]).view(num_tokens * topk, -1)
        # Transformers keeps [E, H, 2I] and [E, I, H]
        y = self._run_experts(scaled, self.experts.gate_up_proj.transpose(1, 2), self.experts.down_proj.transpose(1, 2),
                              topk_ids.view(-1, 1), None)
        return self.shared_expert(x) + y.view(num_tokens, topk, -1).sum(1), router_logits


def _has(module: nn.Module, path: str) -> bool:
    """True where the attributes of the path are there (an operator.attrgetter that answers instead of raising)."""
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
