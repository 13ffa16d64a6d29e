"""Transformers: the experts of every model that lets its implementation be chosen, on moe_xe."""
from __future__ import annotations

import functools
import inspect
import os
import sys

import torch

from ..nn.gates import first_projection, fused_activation, own_gate
from ..nn.quantized import weight_of
from ..ops import checks
from ..ops.autocast import autocast
from ..ops.block.fused_moe import fused_moe
from ..ops.gemm.grouped_gemm import grouped_gemm
from ..ops.routing.token_sort import sort_tokens
from ..plan.choice.block_config import MoeConfig
from ..plan.choice.choice import Choice
from ..quantized.stored import method_of
from ..quantized.weight import QuantizedWeight

__all__ = ["experts_forward", "fused_activation", "load_quantized", "register"]

_HUB_OPTIONS = "cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"
_NEEDS = "moe_xe.integrations.transformers needs transformers >= 5.23 (pip install 'moe_xe[transformers]')"


def register(*, config: MoeConfig | None = None, autotune: bool = False) -> None:
    """Makes ``experts_implementation="moe_xe"`` known to Transformers, of dense and FP8 experts, and ``ep_implementation="moe_xe"``; and to
    `from_pretrained` the models that `load_quantized` loads and their save_pretrained saves. Calling it again changes only these arguments.

    FP8 experts (Transformers' FP8Experts) are read in place; activations stay in 16 bits, whatever activation scheme the checkpoint names.

    config, autotune: as in `fused_moe`, for all experts; modules with gates of their own take only the latter.
    ImportError if Transformers is missing, or so old that its experts do not say all that `experts_forward` asks of them.
    """
    try:
        from transformers import __version__
    except ImportError as error:
        raise ImportError(f"{_NEEDS}, which is not installed") from error
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
    except ImportError as error:
        raise ImportError(f"{_NEEDS}, found {__version__}") from error
    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        raise ImportError(f"{_NEEDS}, found {__version__}")
    Choice.of(config, autotune, MoeConfig)      # raises here, not in a model
    forward = functools.partial(experts_forward, config=config, autotune=autotune) if config or autotune else experts_forward
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface.register("moe_xe", forward)
    from . import quantizer  # noqa: F401: registers itself
    if torch.distributed.is_available():
        from . import expert_parallel  # noqa: F401: registers itself


def load_quantized(model: str | os.PathLike, *, model_class: type | None = None, **options):
    """A checkpoint whose experts are quantised, as a model whose experts are: their weights stay `QuantizedWeight`s, on xpu and on cpu.

    model: a folder or a model's name on the hub, in safetensors: gpt-oss' MXFP4, FP8 (blocks or tensors), compressed-tensors (int4, int8,
    FP8, MXFP4 and NVFP4), GPTQ, AWQ, AutoRound or ModelOpt; docs/quantised-models.md has the table. model_class: AutoModelForCausalLM by
    default. options: of its from_pretrained, such as dtype and device_map.

    Experts are read weight by weight, once all else is loaded; no dense copy of them exists at any time. Other weights that are quantised in the
    checkpoint, such as attention's, become dense, in the model's dtype. Activations are not quantised. save_pretrained saves codes and
    scales, and from_pretrained loads them again once `register` was called.

    ImportError as `register`. ValueError for a checkpoint without a quantization_config or of another method, for act-order
    (desc_act=True), for FP8 codes that are no numbers, and for experts that Transformers does not let be chosen.
    """
    if "moe_xe" not in getattr(sys.modules.get("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS", ()):
        register()
    import transformers

    if (implementation := options.setdefault("experts_implementation", "moe_xe")) != "moe_xe":
        raise ValueError(f'experts_implementation must be "moe_xe", which alone can compute them, got {implementation!r}')
    for name in ("config", "quantization_config", "state_dict", "tp_plan", "distributed_config"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be left out, got {type(options[name]).__name__}")
    hub_options = {name: options[name] for name in _HUB_OPTIONS if name in options}
    config = transformers.AutoConfig.from_pretrained(model, **hub_options)
    owner = next((part for part in (config, config.get_text_config()) if getattr(part, "quantization_config", None)), None)
    if owner is None:
        raise ValueError(f"model must have a quantization_config in its config.json, {model} has none: from_pretrained loads it")
    checkpoint = dict(owner.quantization_config)
    del owner.quantization_config
    if checkpoint.get("quant_method") != "moe_xe":      # what moe_xe saved is loaded as it is
        method_of(checkpoint)
        checkpoint = {"quant_method": "moe_xe", "checkpoint": checkpoint}
    config.quantization_config = checkpoint
    return (model_class or transformers.AutoModelForCausalLM).from_pretrained(model, config=config, **options)


def experts_forward(experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor, *, config: MoeConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """What the experts' own forward returns: [T, H], from hidden_states [T, H] and top_k_index, top_k_weights [T, k].

    experts: a module under Transformers' use_experts_implementation. Its weights are read in place. Ids that are not of
    its experts contribute nothing. One `fused_moe` where the gate is one of its activations, else grouped GEMMs around
    the module's own gate. Differentiable in hidden_states, top_k_weights and the module's parameters.
    """
    first = first_projection(experts)
    w13, w2 = (weight_of(experts, name) for name in (first, "down_proj"))
    for name, w in ((first, w13), ("down_proj", w2)):
        checks.check_weight_type(f"experts.{name}", w)
    x = hidden_states if isinstance(w13, QuantizedWeight) else hidden_states.to(w13.dtype)
    x, w13, w2 = autocast(x, w13, w2)
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
    return (y.view(num_tokens, k, y.shape[1]) * weights[..., None]).sum(1).to(x.dtype)
