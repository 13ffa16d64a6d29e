"""Which kinds of tensors an op takes at all: those that lie in memory as they are, or whose own dispatch makes such ones."""
from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from .checks import check_memory

__all__ = ["check_plain", "takes_plain_tensors"]

_PLAIN = torch.Tensor, torch.nn.Parameter
_WRITTEN = "out", "workspace"
_functorch = torch._C._functorch
Parameters, Result = ParamSpec("Parameters"), TypeVar("Result")


def takes_plain_tensors(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates a public op: a TypeError that names the op and the argument for a tensor of a kind that it cannot read.

    That is a distributed one, one of torch.func or with a forward-mode tangent, whose derivative would be lost, one without
    memory of its own, a negated view to write to, and a mixture of fake and real ones. A ValueError where memory was freed.
    Also of tensors within a dataclass, as `SharedExpert` or `QuantizedWeight`.
    """
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        check_plain(op.__name__, {**dict(zip(names, args)), **kwargs})
        return op(*args, **kwargs)

    return checked


def check_plain(op: str, arguments: dict) -> None:
    """The check of `takes_plain_tensors`, of an op's arguments by name."""
    if torch.compiler.is_compiling():
        return
    fake, real = None, None
    transformed = _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    for name, tensor in _tensors(arguments):
        reason = _derivative(tensor) if transformed else None
        reason = reason or _without_memory(tensor, written=name in _WRITTEN)
        if reason is not None:
            raise TypeError(f"{op}: {name} {reason}")
        if type(tensor) not in _PLAIN:
            if _is_a(tensor, "torch._subclasses.fake_tensor", "FakeTensor"):
                fake = name, tensor.fake_mode
        elif not tensor.is_meta:
            real = name
            if not transformed and tensor.layout is torch.strided and not tensor.is_nested:
                check_memory(name, tensor)      # here too: torch's own ops, which some of ours begin with, crash without
    if real is None:
        return
    if fake is None and torch._C._len_torch_dispatch_stack():
        fake = "the FakeTensorMode's result", torch._guards.active_fake_mode()
    if fake is not None and fake[1] is not None and not fake[1].allow_non_fake_inputs:
        raise TypeError(f"{op}: all tensors must be fake or none, but {fake[0]} is and {real} is not")


def _tensors(arguments: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif is_dataclass(value):
            yield from _tensors({f"{name}.{part}": inner for part, inner in vars(value).items()})


def _derivative(tensor: torch.Tensor) -> str | None:
    """Why an op cannot take a tensor that torch.func or forward-mode differentiation wraps."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return "is inside torch.func.grad or another of torch.func's derivatives, which cannot see into moe_xe; use autograd"
        tensor = _functorch.get_unwrapped(tensor)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return "has a forward-mode tangent, but moe_xe has gradients in backward mode only"
    return None


def _without_memory(tensor: torch.Tensor, written: bool) -> str | None:
    """Why an op cannot take a tensor whose values are not, or not as they are, in memory of this process."""
    if type(tensor) not in _PLAIN and _is_a(tensor, "torch.distributed.tensor", "DTensor"):
        return "is a DTensor, but moe_xe runs on local tensors; call .to_local() on it"
    if tensor._is_zerotensor():
        return "is a tensor of zeros without memory of its own; call .clone() on it"
    if written and tensor.is_neg():
        return "is a negated view, whose memory holds other values; call .resolve_neg() on it"
    return None


def _is_a(tensor: torch.Tensor, module: str, name: str) -> bool:
    """isinstance, without importing a module that whoever made such a tensor has imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(tensor, kind)
