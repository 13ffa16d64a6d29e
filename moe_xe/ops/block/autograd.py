"""`fused_moe` as autograd sees it: an op that keeps what backward needs, and the op of its gradients."""
from __future__ import annotations

import torch

from ...plan.choice.choice import Choice
from ...plan.problem import Activation, ActivationKind
from . import training as moe_training
from ..autocast import without_autocast
from .stages import BlockCall
from .training import GRADIENTS, Saved

__all__ = ["differentiable_moe", "wants_gradient"]

_ARGUMENTS = ("Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? b13, Tensor? b2, "
              "Tensor? expert_map, str activation, bool gated, bool interleaved, float alpha, float? limit, "
              "float routed_scaling_factor, bool weight_on_input, str choice")
_NUM_ARGUMENTS = 16


def wants_gradient(call: BlockCall) -> bool:
    """Whether autograd is to go through this call."""
    tensors = [getattr(call, name) for name in GRADIENTS]
    if call.shared is not None:
        tensors += vars(call.shared).values()
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiable_moe(call: BlockCall, recompute: bool) -> torch.Tensor:
    """The block with gradients; shared experts by torch's own linear layers."""
    act = call.activation
    out = torch.ops.moe_xe.fused_moe_training(
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2, call.expert_map,
        act.kind.value, act.gated, act.interleaved, act.alpha, act.limit, call.routed_scaling_factor, call.weight_on_input,
        call.choice.text, recompute)[0]
    if call.shared is None:
        return out
    shared_act = Activation(act.kind, act.gated, False, act.alpha, act.limit)
    return out + moe_training.shared_expert(call.hidden_states, call.shared, shared_act)


def _call(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, activation, gated, interleaved, alpha, limit,
          routed_scaling_factor, weight_on_input, choice) -> BlockCall:
    return BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, None,
                     Activation(ActivationKind(activation), gated, interleaved, alpha, limit), routed_scaling_factor, weight_on_input,
                     Choice.parse(choice))


@torch.library.custom_op("moe_xe::fused_moe_training", mutates_args=(), device_types=("cpu", "xpu"),
                         schema=f"({_ARGUMENTS}, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
@without_autocast
def fused_moe_training(*arguments):
    out, saved = moe_training.forward(_call(*arguments[:-1]), arguments[-1])
    return out, saved.tokens_per_expert, saved.row_pairs, saved.row_scales, saved.z


@torch.library.register_fake("moe_xe::fused_moe_training")
def _(hidden_states, w13, w2, topk_weights, topk_ids, *rest):
    rows, z_rows = topk_ids.numel(), 0 if rest[-1] else topk_ids.numel()
    return (hidden_states.new_empty(hidden_states.shape), topk_ids.new_empty(w13.shape[0], dtype=torch.int32),
            topk_ids.new_empty(rows, dtype=torch.int32), topk_ids.new_empty(rows, dtype=torch.float32),
            hidden_states.new_empty(z_rows, w13.shape[1]))


@torch.library.custom_op("moe_xe::fused_moe_backward", mutates_args=(), device_types=("cpu", "xpu"), schema=(
    f"(Tensor grad_out, {_ARGUMENTS}, Tensor tokens_per_expert, Tensor row_pairs, Tensor row_scales, Tensor z, "
    f"bool[{len(GRADIENTS)}] needed) -> Tensor[]"))
@without_autocast
def fused_moe_backward(grad_out, *arguments):
    """The needed gradients, in the order of GRADIENTS."""
    *rest, needed = arguments
    call, saved = _call(*rest[:_NUM_ARGUMENTS]), Saved(*rest[_NUM_ARGUMENTS:])
    gradients = moe_training.backward(grad_out, call, saved, dict(zip(GRADIENTS, needed)))
    return [gradients[name] for name, wanted in zip(GRADIENTS, needed) if wanted]


@torch.library.register_fake("moe_xe::fused_moe_backward")
def _(grad_out, *arguments):
    *rest, needed = arguments
    call = _call(*rest[:_NUM_ARGUMENTS])
    return [torch.empty_like(getattr(call, name)) for name, wanted in zip(GRADIENTS, needed) if wanted]


def _setup_context(ctx, inputs, output):
    *arguments, _ = inputs
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    ctx.arguments = [None if isinstance(value, torch.Tensor) else value for value in arguments]
    ctx.is_tensor = [isinstance(value, torch.Tensor) for value in arguments]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, *_):
    tensors = iter(ctx.saved_tensors)
    arguments = [next(tensors) if is_tensor else value for value, is_tensor in zip(ctx.arguments, ctx.is_tensor)]
    saved = list(tensors)
    places = [0, 1, 2, 3, 5, 6]     # of GRADIENTS among the arguments
    needed = [grad_out is not None and ctx.needs_input_grad[place] for place in places]
    result = [None] * (_NUM_ARGUMENTS + 1)
    if any(needed):
        gradients = iter(torch.ops.moe_xe.fused_moe_backward(grad_out, *arguments, *saved, needed))
        for place, wanted in zip(places, needed):
            if wanted:
                result[place] = next(gradients)
    return tuple(result)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("moe_xe: fused_moe has no second derivatives")


torch.library.register_autograd("moe_xe::fused_moe_training", _backward, setup_context=_setup_context)
torch.library.register_autograd("moe_xe::fused_moe_backward", _no_second_derivative)
