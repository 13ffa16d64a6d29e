"""Which of the fused activations an experts module of another library computes, found out by trying."""
from __future__ import annotations

import itertools
import math
import weakref

import torch

from ..ops.activation import apply_activation
from ..plan.problem import Activation, ActivationKind

__all__ = ["fused_activation"]

_EXPERT_TENSORS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
_found: weakref.WeakKeyDictionary[torch.nn.Module, tuple | None] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def fused_activation(experts: torch.nn.Module) -> tuple[str, float, float | None] | None:
    """(activation, alpha, limit) of `fused_moe` that equal the experts' gate, or None if there are none.

    experts: has_gate, is_concatenated, and `_apply_gate` or, without a gate, `act_fn`. What decides is what these compute
    for a wide range of numbers, not what they are called; candidates for alpha and limit are the attributes with such names.
    The answer is kept for the life of the module.
    """
    if experts not in _found:
        _found[experts] = _find(experts)
    return _found[experts]


def _find(experts: torch.nn.Module) -> tuple[str, float, float | None] | None:
    tensors = itertools.chain(experts.named_parameters(), experts.named_buffers())
    if any(name not in _EXPERT_TENSORS for name, _ in tensors):  # a gate that is learned is not one of ours
        return None
    x = _probe()
    with torch.no_grad():
        expected = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    for candidate in _candidates(experts):
        actual = apply_activation(x, candidate)
        if actual.shape == expected.shape and torch.allclose(actual, expected.double(), rtol=1e-5, atol=1e-8):
            return candidate.kind.value, candidate.alpha, candidate.limit
    return None


def _probe() -> torch.Tensor:
    """[rows, 4] numbers of both signs, from 1e-3 to 1e4 in size. On the CPU: not every GPU has float64, without which two
    ways of writing one activation differ in their tails."""
    generator = torch.Generator().manual_seed(0)
    shape = (2048, 4)
    exponents = torch.empty(shape, dtype=torch.float64, device="cpu").uniform_(-3, 4, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1
    return signs * 10**exponents


def _candidates(experts: torch.nn.Module):
    def numbers(suffix):
        return [float(value) for name, value in vars(experts).items()
                if name.endswith(suffix) and isinstance(value, (int, float)) and 0 < value < math.inf]

    for kind, limit in itertools.product(ActivationKind, [None, *numbers("limit")]):
        for alpha in numbers("alpha") if kind is ActivationKind.swiglu_oai else [1.0]:
            yield Activation(kind, experts.has_gate, experts.has_gate and not experts.is_concatenated, alpha, limit)
