"""A computation with gradients of its own as two ops: one that keeps what backward needs, and one that computes gradients."""
from __future__ import annotations

from collections.abc import Callable

import torch

from . import checks
from .autocast import without_autocast
from .library import define
from .signature import SavedArguments, Signature

__all__ = ["define_training_op", "wants_gradient"]


def wants_gradient(call, signature: Signature) -> bool:
    """Whether autograd is to go through this call."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in signature.tensors(call).values())


def define_training_op(name: str, signature: Signature, saved: Signature, gradients: tuple[str, ...], *,
                       forward: Callable, backward: Callable, fake_saved: Callable) -> None:
    """Registers ``moe_xe::name(*signature, recompute) -> (out, *saved)`` and ``moe_xe::name_backward`` with torch.

    The first argument is the input [T, H], in whose shape and dtype the result is. gradients: the arguments that can have one.
    forward(submission, call, recompute) -> (out, saved). backward(submission, grad_out, call, saved, needed) -> the gradients by
    name, for needed: name -> bool. fake_saved(call, recompute) -> saved, as tensors without values.
    """
    count, places = len(signature), [signature.names.index(argument) for argument in gradients]

    @without_autocast
    def body(submission, *arguments):
        call = signature.unflatten(arguments[:-1])
        checks.check_addresses(**signature.tensors(call))
        out, kept = forward(submission, call, arguments[-1])
        return out, *saved.flatten(kept)

    def fake(*arguments):
        kept = fake_saved(signature.unflatten(arguments[:-1]), arguments[-1])
        return arguments[0].new_empty(arguments[0].shape), *saved.flatten(kept)

    @without_autocast
    def backward_body(submission, grad_out, *arguments):
        """The needed gradients, in the order of `gradients`."""
        *rest, needed = arguments
        call = signature.unflatten(rest[:count])
        checks.check_addresses(grad_out=grad_out, **signature.tensors(call))     # parameters may have been freed since forward
        found = backward(submission, grad_out, call, saved.unflatten(rest[count:]), dict(zip(gradients, needed)))
        return [found[argument] for argument, wanted in zip(gradients, needed) if wanted]

    def fake_backward(grad_out, *arguments):
        return [torch.empty_like(arguments[place]) for place, wanted in zip(places, arguments[-1]) if wanted]

    def setup_context(ctx, inputs, output):
        ctx.arguments = SavedArguments(ctx, inputs[:-1], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward_rule(ctx, grad_out, *_):
        needed = [grad_out is not None and ctx.needs_input_grad[place] for place in places]
        result = [None] * (count + 1)
        if any(needed):
            found = iter(backward_op(grad_out, *ctx.arguments.of(ctx), needed))
            for place, wanted in zip(places, needed):
                if wanted:
                    result[place] = next(found)
        return tuple(result)

    def no_second_derivative(ctx, *_):
        raise RuntimeError(f"moe_xe: {name.removesuffix('_training')} has no second derivatives")

    define(name, f"({signature.schema}, bool recompute) -> (Tensor{', Tensor' * len(saved)})", body, fake)
    backward_op = define(f"{name}_backward", f"(Tensor grad_out, {signature.schema}, {saved.schema}, bool[{len(gradients)}] needed) -> Tensor[]",
                         backward_body, fake_backward)
    torch.library.register_autograd(f"moe_xe::{name}", backward_rule, setup_context=setup_context)
    torch.library.register_autograd(f"moe_xe::{name}_backward", no_second_derivative)
