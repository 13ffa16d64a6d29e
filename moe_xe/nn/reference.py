"""The families' blocks as their definitions say, token by token, in the dtype of the weights.

Each function takes a block's state dict (of moe_xe.nn or Transformers) and tokens [T, H], and returns [T, H].
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import silu

__all__ = ["deepseek_v3", "gpt_oss", "llama4", "mixtral", "qwen3_moe"]

Weights = Mapping[str, torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]


def _best(scores: torch.Tensor, count: int) -> list[int]:
    return scores.argsort(descending=True, stable=True)[:count].tolist()


def _gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
           activation: Activation) -> torch.Tensor:
    """One expert for one token, with the weights of linear layers."""
    return down @ (activation(gate @ x) * (up @ x))


def _expert(weights: Weights, expert: int, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = weights["experts.gate_up_proj"][expert].chunk(2)
    return _gated(x, gate, up, weights["experts.down_proj"][expert], activation)


def _shared(weights: Weights, name: str, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return _gated(x, gate, up, down, activation)


def qwen3_moe(weights: Weights, hidden_states: torch.Tensor, *, top_k: int, norm_topk_prob: bool = True,
              activation: Activation = silu) -> torch.Tensor:
    out = torch.zeros_like(hidden_states)
    for token, x in enumerate(hidden_states):
        probabilities = (weights["gate.weight"] @ x).softmax(0)
        chosen = _best(probabilities, top_k)
        total = probabilities[chosen].sum() if norm_topk_prob else 1.0
        for expert in chosen:
            out[token] += probabilities[expert] / total * _expert(weights, expert, x, activation)
    return out


def mixtral(weights: Weights, hidden_states: torch.Tensor, *, top_k: int, activation: Activation = silu) -> torch.Tensor:
    return qwen3_moe(weights, hidden_states, top_k=top_k, norm_topk_prob=True, activation=activation)


def gpt_oss(weights: Weights, hidden_states: torch.Tensor, *, top_k: int, alpha: float = 1.702,
            limit: float = 7.0) -> torch.Tensor:
    out = torch.zeros_like(hidden_states)
    for token, x in enumerate(hidden_states):
        logits = weights["router.weight"] @ x + weights["router.bias"]
        chosen = _best(logits, top_k)
        for expert, weight in zip(chosen, logits[chosen].softmax(0)):
            gate_up = x @ weights["experts.gate_up_proj"][expert] + weights["experts.gate_up_proj_bias"][expert]
            gate, up = gate_up[0::2].clamp(max=limit), gate_up[1::2].clamp(-limit, limit)
            h = gate * torch.sigmoid(alpha * gate) * (up + 1)
            y = h @ weights["experts.down_proj"][expert] + weights["experts.down_proj_bias"][expert]
            out[token] += weight * y
    return out


def deepseek_v3(weights: Weights, hidden_states: torch.Tensor, *, top_k: int, num_groups: int = 1, topk_groups: int = 1,
                norm_topk_prob: bool = True, routed_scaling_factor: float = 1.0,
                activation: Activation = silu) -> torch.Tensor:
    out = torch.zeros_like(hidden_states)
    for token, x in enumerate(hidden_states):
        scores = (weights["gate.weight"] @ x).sigmoid()
        biased = scores + weights["gate.e_score_correction_bias"]
        groups = biased.view(num_groups, -1)
        open_groups = _best(torch.stack([group.sort(descending=True).values[:2].sum() for group in groups]), topk_groups)
        choice = torch.full_like(groups, -torch.inf)
        choice[open_groups] = groups[open_groups]
        chosen = _best(choice.flatten(), top_k)
        total = scores[chosen].sum() if norm_topk_prob else 1.0
        for expert in chosen:
            out[token] += routed_scaling_factor * scores[expert] / total * _expert(weights, expert, x, activation)
        out[token] += _shared(weights, "shared_experts", x, activation)
    return out


def llama4(weights: Weights, hidden_states: torch.Tensor, *, top_k: int, activation: Activation = silu) -> torch.Tensor:
    out = torch.zeros_like(hidden_states)
    for token, x in enumerate(hidden_states):
        logits = weights["router.weight"] @ x
        for expert in _best(logits, top_k):
            gate, up = weights["experts.gate_up_proj"][expert].T.chunk(2)
            down = weights["experts.down_proj"][expert].T
            out[token] += _gated(logits[expert].sigmoid() * x, gate, up, down, activation)
        out[token] += _shared(weights, "shared_expert", x, activation)
    return out
