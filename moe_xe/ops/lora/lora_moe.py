"""The MoE MLP block with low-rank adapters (LoRA) on the experts' weights, for training and inference."""
from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...plan.choice.block_config import MoeConfig
from ...plan.choice.choice import Choice
from ...plan.problem import Activation, ActivationKind
from .. import checks
from . import training as lora_training
from ..autocast import autocast, without_autocast
from ..block.fused_moe import fused_moe, validate
from .training import GRADIENTS, LoraAdapter, LoraCall, Saved, arguments_of
from ..block.stages import BlockCall, SharedExpert
from ..block.training import shared_expert

__all__ = ["LoraAdapter", "lora_moe"]


def lora_moe(hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor,
             topk_ids: torch.Tensor, *, lora13: LoraAdapter | None = None, lora2: LoraAdapter | None = None,
             activation: str = "silu", interleaved: bool = False, alpha: float = 1.702, limit: float | None = None,
             b13: torch.Tensor | None = None, b2: torch.Tensor | None = None, expert_map: torch.Tensor | None = None,
             shared: SharedExpert | None = None, routed_scaling_factor: float = 1.0, weight_on_input: bool = False,
             weight_layout: str = "enk", recompute: bool = True, config: MoeConfig | None = None,
             autotune: bool = False) -> torch.Tensor:
    """`fused_moe` with ``w13[e] + lora13.scaling * lora13.b[e] @ lora13.a[e]`` for w13, and w2 likewise, never formed.

    lora13: a [E, r, H], b [E, 2I or I, r]. lora2: a [E, r, I], b [E, H, r]. b's rows are in the order of the weights' rows,
    interleaved ones too; weight_layout says nothing about adapters. Any rank, also two different ones; bfloat16, float16 or
    float32, cast to hidden_states' dtype.
    All else as in `fused_moe`, whose result comes without adapters; shared experts are torch's linear layers, and
    weight_on_input multiplies a copy of hidden_states for each of a token's experts.

    Differentiable in hidden_states, the adapters, topk_weights, the weights, biases and the shared expert; what does not
    require a gradient, such as a frozen base, costs none. recompute: backward computes the first GEMM and its adapter again
    instead of keeping their sums, [T * k, 2I]. config: of the GEMMs with w13 and w2; those with adapters have none.

    Returns a new [T, H]. Raises TypeError or ValueError naming the argument.
    """
    options = dict(activation=activation, interleaved=interleaved, alpha=alpha, limit=limit, b13=b13, b2=b2,
                   expert_map=expert_map, shared=shared, routed_scaling_factor=routed_scaling_factor,
                   weight_on_input=weight_on_input, weight_layout=weight_layout)
    if lora13 is None and lora2 is None:
        return fused_moe(hidden_states, w13, w2, topk_weights, topk_ids, recompute=recompute, config=config, autotune=autotune, **options)
    hidden_states, w13, w2 = autocast(hidden_states, w13, w2)
    if isinstance(shared, SharedExpert):
        options["shared"] = SharedExpert(*autocast(shared.up_proj, shared.down_proj, shared.gate_proj), shared.weights)
    block = validate(hidden_states, w13, w2, topk_weights, topk_ids, **options, choice=Choice.of(config, autotune, MoeConfig))
    adapters = [_checked("lora13", lora13, block.w13, hidden_states), _checked("lora2", lora2, block.w2, hidden_states)]
    out = _on_input(block, adapters, recompute) if weight_on_input else _routed(LoraCall(block, *adapters), recompute)
    if block.shared is not None:
        out = out + shared_expert(hidden_states, block.shared, replace(block.activation, interleaved=False))
    return out


def _checked(name: str, adapter: LoraAdapter | None, w: torch.Tensor, hidden_states: torch.Tensor) -> LoraAdapter | None:
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
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}.{part} must be {list(shape)}, got {checks.shape_of(tensor)}")
    if isinstance(adapter.scaling, bool) or not isinstance(adapter.scaling, (int, float)):
        raise TypeError(f"{name}.scaling must be a number, got {adapter.scaling!r}")
    if not math.isfinite(adapter.scaling):
        raise ValueError(f"{name}.scaling must be finite, got {adapter.scaling}")
    checks.check_same_device(hidden_states=hidden_states, **{f"{name}.a": adapter.a, f"{name}.b": adapter.b})
    a, b = (tensor.to(hidden_states.dtype).contiguous() for tensor in (adapter.a, adapter.b))
    return LoraAdapter(a, b, float(adapter.scaling))


def _on_input(block: BlockCall, adapters: list[LoraAdapter | None], recompute: bool) -> torch.Tensor:
    """Weights that scale the first GEMM's input: each pair becomes a token of its own, with one expert and weight 1."""
    x, weights, ids = block.hidden_states, block.topk_weights, block.topk_ids
    factors = weights.to(torch.float32) * block.routed_scaling_factor
    pairs = (x[:, None] * factors[..., None]).to(x.dtype).flatten(0, 1)
    of_pairs = replace(block, hidden_states=pairs, topk_weights=torch.ones_like(factors).view(-1, 1),
                       topk_ids=ids.reshape(-1, 1), routed_scaling_factor=1.0)
    return _routed(LoraCall(of_pairs, *adapters), recompute).view(*ids.shape, x.shape[1]).sum(1)


def _routed(call: LoraCall, recompute: bool) -> torch.Tensor:
    act, tensors = call.block.activation, arguments_of(call)
    base, adapters = list(tensors.values())[:_NUM_BASE], list(tensors.values())[_NUM_BASE:]
    keep = not recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    return torch.ops.moe_xe.lora_moe(
        *base, *adapters, call.block.topk_ids, call.block.expert_map,
        *(1.0 if adapter is None else adapter.scaling for adapter in (call.lora13, call.lora2)),
        act.kind.value, act.gated, act.interleaved, act.alpha, act.limit, call.block.routed_scaling_factor, call.block.choice.text,
        not keep)[0]


_NUM_BASE = 6      # of GRADIENTS that are not adapters'
_ARGUMENTS = ("Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor? b13, Tensor? b2, Tensor? lora13_a, "
              "Tensor? lora13_b, Tensor? lora2_a, Tensor? lora2_b, Tensor topk_ids, Tensor? expert_map, float scaling13, "
              "float scaling2, str activation, bool gated, bool interleaved, float alpha, float? limit, float routed_scaling_factor, "
              "str choice")
_NUM_ARGUMENTS = 21


def _call(hidden_states, w13, w2, topk_weights, b13, b2, lora13_a, lora13_b, lora2_a, lora2_b, topk_ids, expert_map, scaling13,
          scaling2, activation, gated, interleaved, alpha, limit, routed_scaling_factor, choice) -> LoraCall:
    block = BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, None,
                      Activation(ActivationKind(activation), gated, interleaved, alpha, limit), routed_scaling_factor, False, Choice.parse(choice))
    return LoraCall(block, None if lora13_a is None else LoraAdapter(lora13_a, lora13_b, scaling13),
                    None if lora2_a is None else LoraAdapter(lora2_a, lora2_b, scaling2))


@torch.library.custom_op("moe_xe::lora_moe", mutates_args=(), device_types=("cpu", "xpu"),
                         schema=f"({_ARGUMENTS}, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
@without_autocast
def lora_moe_op(*arguments):
    """The result and what backward needs, as in `lora_training.Saved`."""
    *rest, recompute = arguments
    out, saved = lora_training.forward(_call(*rest), recompute)
    return out, saved.tokens_per_expert, saved.row_pairs, saved.row_scales, saved.z, saved.low


@torch.library.register_fake("moe_xe::lora_moe")
def _(*arguments):
    *rest, recompute = arguments
    call = _call(*rest)
    x, ids, (num_experts, n13, _) = call.block.hidden_states, call.block.topk_ids, call.block.w13.shape
    rows, rank = ids.numel(), 0 if call.lora13 is None else call.lora13.a.shape[1]
    kept = 0 if recompute else rows
    return (x.new_empty(x.shape), ids.new_empty(num_experts, dtype=torch.int32), ids.new_empty(rows, dtype=torch.int32),
            ids.new_empty(rows, dtype=torch.float32), x.new_empty(kept, n13), x.new_empty(kept if rank else 0, rank))


@torch.library.custom_op("moe_xe::lora_moe_backward", mutates_args=(), device_types=("cpu", "xpu"), schema=(
    f"(Tensor grad_out, {_ARGUMENTS}, Tensor tokens_per_expert, Tensor row_pairs, Tensor row_scales, Tensor z, Tensor low, "
    f"bool[{len(GRADIENTS)}] needed) -> Tensor[]"))
@without_autocast
def lora_moe_backward(grad_out, *arguments):
    """The needed gradients, in the order of GRADIENTS."""
    *rest, needed = arguments
    call, saved = _call(*rest[:_NUM_ARGUMENTS]), Saved(*rest[_NUM_ARGUMENTS:])
    gradients = lora_training.backward(grad_out, call, saved, dict(zip(GRADIENTS, needed)))
    return [gradients[name] for name, wanted in zip(GRADIENTS, needed) if wanted]


@torch.library.register_fake("moe_xe::lora_moe_backward")
def _(grad_out, *arguments):
    *rest, needed = arguments
    tensors = arguments_of(_call(*rest[:_NUM_ARGUMENTS]))
    return [torch.empty_like(tensors[name]) for name, wanted in zip(GRADIENTS, needed) if wanted]


def _setup_context(ctx, inputs, output):
    *arguments, _ = inputs
    ctx.arguments = [None if isinstance(value, torch.Tensor) else value for value in arguments]
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in arguments]
    ctx.save_for_backward(*(value for value in arguments if isinstance(value, torch.Tensor)), *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, *_):
    tensors = iter(ctx.saved_tensors)
    arguments = [next(tensors) if is_tensor else value for value, is_tensor in zip(ctx.arguments, ctx.is_tensor)]
    needed = [grad_out is not None and wanted for wanted in ctx.needs_input_grad[:len(GRADIENTS)]]
    result = [None] * (_NUM_ARGUMENTS + 1)
    if any(needed):
        gradients = iter(torch.ops.moe_xe.lora_moe_backward(grad_out, *arguments, *tensors, needed))
        result[:len(needed)] = [next(gradients) if wanted else None for wanted in needed]
    return tuple(result)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("moe_xe: lora_moe has no second derivatives")


torch.library.register_autograd("moe_xe::lora_moe", _backward, setup_context=_setup_context)
torch.library.register_autograd("moe_xe::lora_moe_backward", _no_second_derivative)
