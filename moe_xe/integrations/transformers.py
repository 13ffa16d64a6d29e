"""Transformers: the experts of every model that lets its implementation be chosen, on moe_xe."""
from __future__ import annotations

import functools
import inspect

import torch

from ..nn.gates import first_projection, fused_activation, own_gate
from ..ops import checks
from ..ops.autocast import autocast
from ..ops.block.fused_moe import fused_moe
from ..ops.gemm.grouped_gemm import grouped_gemm
from ..ops.routing.token_sort import sort_tokens
from ..plan.choice.block_config import MoeConfig
from ..plan.choice.choice import Choice

__all__ = ["experts_forward", "fused_activation", "register"]

_NEEDS = "moe_xe.integrations.transformers needs transformers >= 5.23 (pip install 'moe_xe[transformers]')"


def register(*, config: MoeConfig | None = None, autotune: bool = False) -> None:
    """Makes ``experts_implementation="moe_xe"`` known to Transformers. Calling it again changes only these arguments.

    config, autotune: as in `fused_moe`, for all experts; modules with gates of their own take only the latter.
    ImportError if Transformers is missing, or so old that its experts do not say all that `experts_forward` asks of them.
    """
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"{_NEEDS}, which is not installed") from error
    try:
        from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
    except ImportError as error:
        raise ImportError(f"{_NEEDS}, found {__version__}") from error
    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        raise ImportError(f"{_NEEDS}, found {__version__}")
    Choice.of(config, autotune, MoeConfig)      # raises here, not in a model
    forward = functools.partial(experts_forward, config=config, autotune=autotune) if config or autotune else experts_forward
    ExpertsInterface.register("moe_xe", forward)


def experts_forward(experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor, *, config: MoeConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """What the experts' own forward returns: [T, H], from hidden_states [T, H] and top_k_index, top_k_weights [T, k].

    experts: a module under Transformers' use_experts_implementation. Its weights are read in place. Ids that are not of
    its experts contribute nothing. One `fused_moe` where the gate is one of its activations, else grouped GEMMs around
    the module's own gate. Differentiable in hidden_states, top_k_weights and the module's parameters.
    """
    first = first_projection(experts)
    w13, w2 = getattr(experts, first), experts.down_proj
    for name, w in ((first, w13), ("down_proj", w2)):
        checks.check_weight_type(f"experts.{name}", w)
    x, w13, w2 = autocast(hidden_states.to(w13.dtype), w13, w2)
    b13, b2 = (getattr(experts, f"{name}_bias") if experts.has_bias else None for name in (first, "down_proj"))
    layout = "ekn" if experts.is_transposed else "enk"
    fused = fused_activation(experts)
    if fused is None:
        out = _around_own_gate(experts, x, w13, b13, w2, b2, layout, top_k_index, top_k_weights, autotune)
    else:
        activation, alpha, limit = fused
        out = fused_moe(x, w13, w2, top_k_weights, top_k_index, activation=activation, alpha=alpha,
                        limit=limit, interleaved=not experts.is_concatenated, b13=b13, b2=b2, weight_layout=layout,
                        config=config, autotune=autotune)
    return out.to(hidden_states.dtype)


def _around_own_gate(experts, x, w13, b13, w2, b2, layout, top_k_index, top_k_weights, autotune) -> torch.Tensor:
    """Rows sorted by expert, two grouped GEMMs with the module's own operations between and behind, a token's rows summed.

    GEMMs leave the rows of dropped pairs unwritten. They become zeros, as NaNs would reach the gradients of the module's
    own parameters.
    """
    num_experts, num_tokens, k = w13.shape[0], top_k_index.shape[0], int(top_k_index.shape[1])      # traced, k is a constant
    sorted_tokens = sort_tokens(top_k_index, num_experts)
    tokens_per_expert, pairs = sorted_tokens.tokens_per_expert, sorted_tokens.row_pairs
    h = grouped_gemm(x, w13, tokens_per_expert, bias=b13, gather_indices=pairs.clamp(min=0), gather_divisor=k,
                     weight_layout=layout, autotune=autotune)
    h = own_gate(experts, h.masked_fill((pairs < 0)[:, None], 0)).to(x.dtype).contiguous()
    y = grouped_gemm(h, w2, tokens_per_expert, bias=b2, scatter_indices=pairs, weight_layout=layout, out_dtype=torch.float32,
                     autotune=autotune)
    dropped = (top_k_index < 0) | (top_k_index >= num_experts)
    y = y.masked_fill(dropped.view(-1, 1), 0)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y.to(x.dtype)).float()
    weights = top_k_weights.float().masked_fill(dropped, 0)
    return (y.view(num_tokens, k, -1) * weights[..., None]).sum(1).to(x.dtype)
