"""Transformers: the experts of every model that lets its implementation be chosen, on moe_xe."""
from __future__ import annotations

import functools
import inspect
import itertools
import math
import weakref

import torch

from ..nn.activations import recognise
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
    w13, b13 = _first_projection(experts)
    x, w13, w2 = autocast(hidden_states.to(w13.dtype), w13, experts.down_proj)
    b2 = experts.down_proj_bias if experts.has_bias else None
    layout = "ekn" if experts.is_transposed else "enk"
    fused = None if experts.has_post_expert_norm else fused_activation(experts)
    if fused is None:
        out = _around_own_gate(experts, x, w13, b13, w2, b2, layout, top_k_index, top_k_weights, autotune)
    else:
        activation, alpha, limit = fused
        out = fused_moe(x, w13, w2, top_k_weights, top_k_index, activation=activation, alpha=alpha,
                        limit=limit, interleaved=not experts.is_concatenated, b13=b13, b2=b2, weight_layout=layout,
                        config=config, autotune=autotune)
    return out.to(hidden_states.dtype)


def _first_projection(experts: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    return getattr(experts, name), getattr(experts, name + "_bias") if experts.has_bias else None


def _own_gate(experts: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)


_EXPERT_TENSORS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
_fused_activations: weakref.WeakKeyDictionary[torch.nn.Module, tuple | None] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def fused_activation(experts: torch.nn.Module) -> tuple[str, float, float | None] | None:
    """(activation, alpha, limit) of `fused_moe` that equal the experts' own gate, or None.

    Found by trying what the gate computes; alpha and limit are among the attributes with such names. A gate with tensors
    of its own is not tried. The answer is kept for the life of the module, and a constant to torch.compile.
    """
    if experts not in _fused_activations:
        _fused_activations[experts] = _find_fused_activation(experts)
    return _fused_activations[experts]


def _find_fused_activation(experts: torch.nn.Module) -> tuple[str, float, float | None] | None:
    tensors = itertools.chain(experts.named_parameters(), experts.named_buffers())
    if any(name not in _EXPERT_TENSORS for name, _ in tensors):
        return None
    found = recognise(lambda x: _own_gate(experts, x), gated=experts.has_gate, interleaved=not experts.is_concatenated,
                      alphas=_numbers(experts, "alpha"), limits=_numbers(experts, "limit"))
    return found and (found.kind.value, found.alpha, found.limit)


def _numbers(module: torch.nn.Module, suffix: str) -> list[float]:
    """The positive, finite numbers among the attributes whose names end so."""
    return [float(value) for name, value in vars(module).items()
            if name.endswith(suffix) and isinstance(value, (int, float)) and 0 < value < math.inf]


def _around_own_gate(experts, x, w13, b13, w2, b2, layout, top_k_index, top_k_weights, autotune) -> torch.Tensor:
    """Rows sorted by expert, two grouped GEMMs with the module's own operations between and behind, a token's rows summed.

    GEMMs leave the rows of dropped pairs unwritten. They become zeros, as NaNs would reach the gradients of the module's
    own parameters.
    """
    num_experts, (num_tokens, k) = w13.shape[0], top_k_index.shape
    sorted_tokens = sort_tokens(top_k_index, num_experts)
    tokens_per_expert, pairs = sorted_tokens.tokens_per_expert, sorted_tokens.row_pairs
    h = grouped_gemm(x, w13, tokens_per_expert, bias=b13, gather_indices=pairs.clamp(min=0), gather_divisor=k,
                     weight_layout=layout, autotune=autotune)
    h = _own_gate(experts, h.masked_fill((pairs < 0)[:, None], 0)).to(x.dtype).contiguous()
    y = grouped_gemm(h, w2, tokens_per_expert, bias=b2, scatter_indices=pairs, weight_layout=layout, out_dtype=torch.float32,
                     autotune=autotune)
    dropped = (top_k_index < 0) | (top_k_index >= num_experts)
    y = y.masked_fill(dropped.view(-1, 1), 0)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y.to(x.dtype)).float()
    weights = top_k_weights.float().masked_fill(dropped, 0)
    return (y.view(num_tokens, k, -1) * weights[..., None]).sum(1).to(x.dtype)
