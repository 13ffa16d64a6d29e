"""Which of moe_xe's activations another library's function computes, found out by trying."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from ..ops.block.activation import apply_activation
from ..plan.problem import ACTIVATION_NAMES, Activation, ActivationKind

__all__ = ["activation_name", "recognise"]


def recognise(function: Callable[[torch.Tensor], torch.Tensor], *, gated: bool, interleaved: bool = False,
              alphas: Iterable[float] = (), limits: Iterable[float] = ()) -> Activation | None:
    """The activation that equals `function` over a wide range of numbers, whatever it is called, or None.

    function: [rows, N] -> [rows, N/2] if gated, else [rows, N]; called once, with float64 numbers on the CPU, so it must
    not hold tensors elsewhere. alphas, limits: the parameters that it may have.
    """
    with ThreadPoolExecutor(1) as thread:      # no mode of the caller's is on there: fake tensors, tracing, transforms, autocast
        return thread.submit(_recognise, function, gated, interleaved, list(alphas), list(limits)).result()


def _recognise(function, gated: bool, interleaved: bool, alphas: list[float], limits: list[float]) -> Activation | None:
    x = _probe()
    with torch.no_grad():
        expected = function(x).double()
    for kind, limit in itertools.product(ActivationKind, [None, *limits]):
        for alpha in alphas if kind is ActivationKind.swiglu_oai else [1.0]:
            activation = Activation(kind, gated, interleaved and gated, alpha, limit)
            actual = apply_activation(x, activation)
            if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-5, atol=1e-8):
                return activation
    return None


def activation_name(function: Callable[[torch.Tensor], torch.Tensor], name: str) -> str:
    """`fused_moe`'s name of an activation without a limit, such as a module's act_fn; ValueError if it has none."""
    activation = recognise(function, gated=False)
    if activation is None:
        raise ValueError(f"{name} must compute one of {', '.join(ACTIVATION_NAMES)}, got {function}")
    return activation.kind.value


def _probe() -> torch.Tensor:
    """[rows, 4] numbers of both signs, from 1e-3 to 1e4 in size. On the CPU: not every GPU has float64, without which two
    ways of writing one activation differ in their tails."""
    generator = torch.Generator().manual_seed(0)
    shape = (2048, 4)
    exponents = torch.empty(shape, dtype=torch.float64, device="cpu").uniform_(-3, 4, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu") * 2 - 1
    return signs * 10**exponents
