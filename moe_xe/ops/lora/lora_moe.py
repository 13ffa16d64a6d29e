"""The MoE MLP block with low-rank adapters (LoRA) on the experts' weights, for training and inference."""
from __future__ import annotations

from dataclasses import replace

import torch

from ...plan.choice.block_config import MoeConfig
from .. import checks
from ..block.call import BlockCall, SharedExpert, block_call
from ..block.fused_moe import fused_moe
from ..block.training import shared_expert
from ..plain import takes_plain_tensors
from ..training_op import wants_gradient
from ..weights import Weight
from .training import LORA, LoraAdapter, LoraCall

__all__ = ["LoraAdapter", "lora_calls", "lora_moe"]


@takes_plain_tensors
def lora_moe(hidden_states: torch.Tensor, w13: Weight, w2: Weight, topk_weights: torch.Tensor,
             topk_ids: torch.Tensor, *, lora13: LoraAdapter | None = None, lora2: LoraAdapter | None = None,
             activation: str = "silu", interleaved: bool = False, alpha: float = 1.702, limit: float | None = None,
             b13: torch.Tensor | None = None, b2: torch.Tensor | None = None, expert_map: torch.Tensor | None = None,
             shared: SharedExpert | None = None, routed_scaling_factor: float = 1.0, weight_on_input: bool = False,
             weight_layout: str = "enk", recompute: bool = True, y_dtype: torch.dtype | None = None,
             activations: str | None = None, config: MoeConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """`fused_moe` with ``w13[e] + lora13.scaling * lora13.b[e] @ lora13.a[e]`` for w13, and w2 likewise, never formed.

    lora13: a [E, r, H], b [E, 2I or I, r]. lora2: a [E, r, I], b [E, H, r]. b's rows are in the order of the weights' rows,
    interleaved ones too; weight_layout says nothing about adapters. Any rank, also two different ones; bfloat16, float16 or
    float32, cast to hidden_states' dtype.
    All else as in `fused_moe`, whose result comes without adapters; activations must be None beside adapters; shared experts are torch's
    linear layers, and weight_on_input multiplies a copy of hidden_states for each of a token's experts.

    Differentiable in hidden_states, the adapters, topk_weights, the weights, biases and the shared expert; what does not
    require a gradient, such as a frozen base, costs none. recompute: backward computes the first GEMM and its adapter again
    instead of keeping their sums, [T * k, 2I]. config: of the GEMMs with w13 and w2; those with adapters have none.

    Returns a new [T, H]. Raises TypeError or ValueError naming the argument.
    """
    options = dict(activation=activation, interleaved=interleaved, alpha=alpha, limit=limit, b13=b13, b2=b2,
                   expert_map=expert_map, shared=shared, routed_scaling_factor=routed_scaling_factor,
                   weight_on_input=weight_on_input, weight_layout=weight_layout, y_dtype=y_dtype, activations=activations, config=config,
                   autotune=autotune)
    if lora13 is None and lora2 is None:
        return fused_moe(hidden_states, w13, w2, topk_weights, topk_ids, recompute=recompute, **options)
    block, routed = lora_calls(hidden_states, w13, w2, topk_weights, topk_ids, lora13=lora13, lora2=lora2, recompute=recompute, **options)
    out = _on_input(routed, recompute) if weight_on_input else _routed(routed, recompute)
    return out if shared is None else out + shared_expert(block)


def lora_calls(*arguments, lora13, lora2, recompute, **options) -> tuple[BlockCall, LoraCall]:
    """Of the arguments of `lora_moe`: the call without adapters, and the call of its routed experts; checks all that can be known without
    the device."""
    block = block_call(*arguments, **options)
    if block.activations is not None and (lora13 is not None or lora2 is not None):
        raise ValueError(f"activations must be None beside adapters, whose products are of 16 or 32 bits, "
                         f"got {options['activations']!r}")
    routed = LoraCall(**vars(replace(block, shared=None)), lora13=_checked("lora13", lora13, block.w13, block.hidden_states),
                      lora2=_checked("lora2", lora2, block.w2, block.hidden_states))
    checks.check_flags(recompute=recompute)
    return block, routed


def _checked(name: str, adapter: LoraAdapter | None, w: Weight, hidden_states: torch.Tensor) -> LoraAdapter | None:
    """The adapter of logical weights [E, N, K] in the hidden states' dtype."""
    if adapter is None:
        return None
    if not isinstance(adapter, LoraAdapter):
        raise TypeError(f"{name} must be a LoraAdapter, got {type(adapter).__name__}")
    num_experts, n, k = w.shape
    checks.check_tensor(f"{name}.a", adapter.a, 3, "[E, r, K]")
    rank = adapter.a.shape[1]
    if rank == 0:
        raise ValueError(f"{name}.a must have a rank of at least 1, got {checks.shape_of(adapter.a)}")
    for part, shape in (("a", (num_experts, rank, k)), ("b", (num_experts, n, rank))):
        tensor = getattr(adapter, part)
        checks.check_tensor(f"{name}.{part}", tensor, 3, str(list(shape)))
        checks.check_dtype(f"{name}.{part}", tensor.dtype)
        if not checks.has_shape(tensor, shape):
            raise ValueError(f"{name}.{part} must be {list(shape)}, got {checks.shape_of(tensor)}")
    scaling = checks.check_float32(f"{name}.scaling", adapter.scaling)
    checks.check_same_device(hidden_states=hidden_states, **{f"{name}.a": adapter.a, f"{name}.b": adapter.b})
    a, b = (tensor.to(hidden_states.dtype).contiguous() for tensor in (adapter.a, adapter.b))
    return LoraAdapter(a, b, scaling)


def _on_input(call: LoraCall, recompute: bool) -> torch.Tensor:
    """Weights that scale the first GEMM's input: each pair becomes a token of its own, with one expert and weight 1."""
    x, ids = call.hidden_states, call.topk_ids
    factors = call.topk_weights.to(torch.float32) * call.routed_scaling_factor
    pairs = (x[:, None] * factors[..., None]).to(x.dtype).flatten(0, 1)
    of_pairs = replace(call, hidden_states=pairs, topk_weights=torch.ones_like(factors).view(-1, 1), topk_ids=ids.reshape(-1, 1),
                       routed_scaling_factor=1.0, weight_on_input=False)
    return _routed(of_pairs, recompute).view(*ids.shape, x.shape[1]).sum(1)


def _routed(call: LoraCall, recompute: bool) -> torch.Tensor:
    return torch.ops.moe_xe.lora_moe(*LORA.flatten(call), recompute or not wants_gradient(call, LORA))[0]
