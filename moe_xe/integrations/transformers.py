"""Transformers: the experts of every model that lets its implementation be chosen, on moe_xe."""
from __future__ import annotations

import torch

from ..ops.fused_moe import fused_moe
from ..ops.grouped_gemm import grouped_gemm
from .gates import fused_activation

__all__ = ["experts_forward", "register"]


def register() -> None:
    """Makes ``experts_implementation="moe_xe"`` known to Transformers. Calling it again changes nothing.

    ImportError if Transformers is missing or has no interface for experts (before 5.0).
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError("moe_xe.integrations.transformers needs transformers >= 5.0 (pip install 'moe_xe[transformers]'), "
                          f"{_installed()}") from error
    ExpertsInterface.register("moe_xe", experts_forward)


def _installed() -> str:
    try:
        from transformers import __version__
    except ImportError:
        return "which is not installed"
    return f"found {__version__}"


def experts_forward(experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor) -> torch.Tensor:
    """What the experts' own forward returns: [T, H], from hidden_states [T, H] and top_k_index, top_k_weights [T, k].

    experts: a module under Transformers' use_experts_implementation. Its weights are read in place. Ids that are not of its
    experts contribute nothing. One `fused_moe` where the gate is one of its activations, else grouped GEMMs around the
    module's own gate.
    """
    x = hidden_states.to(experts.down_proj.dtype)  # under autocast they may differ
    w13, b13 = _first_projection(experts)
    b2 = experts.down_proj_bias if experts.has_bias else None
    layout = "ekn" if experts.is_transposed else "enk"
    found = None if experts.has_post_expert_norm else fused_activation(experts)
    if found is None:
        out = _around_own_gate(experts, x, w13, b13, b2, layout, top_k_index, top_k_weights)
    else:
        activation, alpha, limit = found
        out = fused_moe(x, w13, experts.down_proj, top_k_weights, top_k_index, activation=activation, alpha=alpha, limit=limit,
                        interleaved=not experts.is_concatenated, b13=b13, b2=b2, weight_layout=layout)
    return out.to(hidden_states.dtype)


def _first_projection(experts):
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    return getattr(experts, name), getattr(experts, name + "_bias") if experts.has_bias else None


def _around_own_gate(experts, x, w13, b13, b2, layout, top_k_index, top_k_weights):
    num_experts, (num_tokens, k) = w13.shape[0], top_k_index.shape
    ids = top_k_index.flatten()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    tokens_per_expert = (sorted_ids == torch.arange(num_experts, device=ids.device)[:, None]).sum(1)

    h = grouped_gemm(x, w13, tokens_per_expert, bias=b13, gather_indices=(order // k).int(), weight_layout=layout)
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    y = grouped_gemm(h.contiguous(), experts.down_proj, tokens_per_expert, bias=b2, weight_layout=layout)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    # rows of ids that are not ours were never written: they are dropped, not multiplied by a weight of zero
    y = torch.where((sorted_ids < num_experts)[:, None], y.float() * top_k_weights.flatten()[order, None], 0.0)
    return torch.zeros_like(y).index_copy(0, order, y).view(num_tokens, k, -1).sum(1)
