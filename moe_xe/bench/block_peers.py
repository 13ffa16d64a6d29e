"""Transformers' blocks on the benchmark's own weights and routing, one for each of its ways to run experts."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .block_models import Family, Inputs, Weights

PEERS = ("eager", "grouped_mm", "batched_mm")


def require_transformers() -> None:
    """ImportError, saying what to install, unless a Transformers with these ways is there."""
    needs = "the block benchmark compares with transformers >= 5.23 (pip install 'transformers>=5.23')"
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"{needs}, which is not installed") from error
    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 23):
        raise ImportError(f"{needs}, found {__version__}")


def temporary_bytes(name: str, family: Family, tokens: int, itemsize: int, training: bool = False) -> int:
    """What a peer needs beyond what any way does: batched_mm copies the weights of each row's expert, and Llama-4's eager
    experts compute every token. In training there are gradients of all that as well.
    """
    model, copies = family.model, 2 if training else 1
    if name == "batched_mm":
        return copies * 3 * tokens * model.top_k * model.hidden_size * model.intermediate_size * itemsize
    if name == "eager" and family.model.name == "llama-4-scout":
        return copies * tokens * model.num_experts * (3 * model.hidden_size + 4 * model.intermediate_size) * itemsize
    return 0


def make_peer(name: str, family: Family, weights: Weights, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Transformers' block, its router replaced by the given routing, as a call that returns [T, H]; nothing is copied."""
    model = family.model
    options = dict(hidden_size=model.hidden_size, num_experts_per_tok=model.top_k, num_attention_heads=4,
                   experts_implementation=name)
    with torch.device("meta"):
        block = _BLOCKS[model.name](family, inputs, options)
    for attribute, tensor in (("gate_up_proj", weights.w13), ("down_proj", weights.w2),
                              ("gate_up_proj_bias", weights.b13), ("down_proj_bias", weights.b2)):
        if tensor is not None:
            setattr(block.experts, attribute, tensor)
    if weights.shared is not None:
        shared = block.shared_experts if hasattr(block, "shared_experts") else block.shared_expert
        for part in ("gate_proj", "up_proj", "down_proj"):
            getattr(shared, part).weight = getattr(weights.shared, part)
    hidden_states = inputs.hidden_states[None]

    def call() -> torch.Tensor:
        out = block(hidden_states)
        return (out[0] if isinstance(out, tuple) else out).view_as(inputs.hidden_states)

    return call


class _GivenRouting(nn.Module):
    """Stands for a router, and returns what it was given whatever the hidden states."""

    def __init__(self, *result: torch.Tensor | None):
        super().__init__()
        self.result = result

    def forward(self, hidden_states: torch.Tensor) -> tuple:
        return self.result


def _given_routing(inputs: Inputs) -> _GivenRouting:
    """All families but Llama-4 return logits, which nobody reads, weights and ids."""
    return _GivenRouting(None, inputs.topk_weights, inputs.topk_ids)


def _qwen3(family: Family, inputs: Inputs, options: dict) -> nn.Module:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
    block = qwen3.Qwen3MoeSparseMoeBlock(qwen3.Qwen3MoeConfig(
        moe_intermediate_size=family.model.intermediate_size, num_experts=family.model.num_experts, **options))
    block.gate = _given_routing(inputs)
    return block


def _mixtral(family: Family, inputs: Inputs, options: dict) -> nn.Module:
    from transformers.models.mixtral import modeling_mixtral as mixtral
    block = mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(
        intermediate_size=family.model.intermediate_size, num_local_experts=family.model.num_experts, **options))
    block.gate = _given_routing(inputs)
    return block


def _gpt_oss(family: Family, inputs: Inputs, options: dict) -> nn.Module:
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    block = gpt_oss.GptOssMLP(gpt_oss.GptOssConfig(
        intermediate_size=family.model.intermediate_size, num_local_experts=family.model.num_experts,
        swiglu_alpha=family.alpha, swiglu_limit=family.limit, **options))
    block.router = _given_routing(inputs)
    return block


def _deepseek(family: Family, inputs: Inputs, options: dict) -> nn.Module:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    block = deepseek.DeepseekV3MoE(deepseek.DeepseekV3Config(
        moe_intermediate_size=family.model.intermediate_size, n_routed_experts=family.model.num_experts,
        n_shared_experts=1, **options))
    block.gate = _given_routing(inputs)
    return block


def _llama4(family: Family, inputs: Inputs, options: dict) -> nn.Module:
    """Llama-4 has one way of its own, "eager"; for the others, its experts are lent the interface of all families."""
    from transformers.integrations.moe import use_experts_implementation
    from transformers.models.llama4 import modeling_llama4 as llama4
    config = llama4.Llama4TextConfig(
        intermediate_size=family.model.intermediate_size, num_local_experts=family.model.num_experts, **options)
    block = llama4.Llama4TextMoe(config)
    if options["experts_implementation"] == "eager":
        block.router = _GivenScores(inputs, family.model.num_experts)
        return block

    class Experts(llama4.Llama4TextExperts):
        pass

    use_experts_implementation(Experts, is_transposed=True)
    return _Llama4WithRouting(Experts(config), block.shared_expert, inputs)


class _GivenScores(nn.Module):
    """Stands for Llama-4's router: a token's weight for each expert, zero for those that it is not routed to."""

    def __init__(self, inputs: Inputs, num_experts: int):
        super().__init__()
        self.topk_weights, self.topk_ids, self.num_experts = inputs.topk_weights, inputs.topk_ids, num_experts

    def forward(self, hidden_states: torch.Tensor) -> tuple:
        scores = self.topk_weights.new_zeros(len(self.topk_ids), self.num_experts)
        return scores.scatter(1, self.topk_ids, self.topk_weights), None


class _Llama4WithRouting(nn.Module):
    """Llama-4's block around experts that compute only the tokens routed to them."""

    def __init__(self, experts: nn.Module, shared_expert: nn.Module, inputs: Inputs):
        super().__init__()
        self.experts, self.shared_expert = experts, shared_expert
        self.topk_weights, self.topk_ids = inputs.topk_weights, inputs.topk_ids
        self.ones = inputs.topk_weights.new_ones(inputs.topk_weights.shape)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.flatten(0, -2)
        return self.experts(x * self.topk_weights, self.topk_ids, self.ones).add_(self.shared_expert(x))


_BLOCKS = {"qwen3-30b-a3b": _qwen3, "llama-4-scout": _llama4, "gpt-oss-20b": _gpt_oss, "deepseek-v3": _deepseek,
           "mixtral-8x7b": _mixtral}
