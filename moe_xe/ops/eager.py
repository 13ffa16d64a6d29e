"""The short way from a public function to the launches, for a call that was made before on plain tensors that nobody watches.

Dispatch modes, torch.func, tracing, autocast, autograd and the profiler must see the op; they, and calls with anything new, go
through all checks and torch's dispatcher.
"""
from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from .arguments import Arguments, arguments_of
from .calls import Known, Seen, form_of, known_calls, seen_calls
from .library import written_to

__all__ = ["repeats"]

Parameters, Result = ParamSpec("Parameters"), TypeVar("Result")
_C = torch._C


def repeats(op: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates a public op that leads to one of torch's ops and returns what that returns."""
    name = f"{op.__module__}.{op.__qualname__}"

    @functools.wraps(op)
    def function(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        arguments = None if torch.compiler.is_compiling() else _plain_arguments(name, args, kwargs)
        if arguments is None:
            return op(*args, **kwargs)
        calls = known_calls()
        known = calls.get(arguments.key)
        if known is not None:
            done, result = known.call(arguments)
            if done:
                return result
        with seen_calls() as seen:
            result = op(*args, **kwargs)
        known = _known(seen, arguments, result)
        if known is not None:
            calls.put(arguments.key, known)
        return result

    return function


def _plain_arguments(name: str, args: tuple, kwargs: dict) -> Arguments | None:
    """Those of a call that may be repeated."""
    if not _is_plain_here() or kwargs.get("check", False) is not False:     # which looks at values
        return None
    arguments = arguments_of((*args, *kwargs.values()), name, tuple(kwargs), is_plain=_is_plain)
    return arguments if arguments is not None and arguments.tensors else None


_PLAIN = torch.Tensor, torch.nn.Parameter


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is just memory, and no gradient is asked for."""
    return (type(tensor) in _PLAIN and not (tensor.requires_grad and torch.is_grad_enabled()) and
            _C._dispatch_keys(tensor).raw_repr() in _plain_keys(tensor.device.type))


def _is_plain_here() -> bool:
    """Whether nothing of torch's is on, on this thread, that sees ops or changes them."""
    modes = _C._len_torch_function_stack()
    return (_state() in _plain_states() and not torch.autograd.profiler._is_profiler_enabled and forward_ad._current_level < 0 and
            (not modes or all(type(_C._get_function_stack_at(place)) is DeviceContext for place in range(modes))))


def _state() -> tuple[int, int]:
    """What the dispatcher looks at besides tensors."""
    return _C._dispatch_tls_local_include_set().raw_repr(), _C._dispatch_tls_local_exclude_set().raw_repr()


def _on_a_new_thread(function: Callable[[], frozenset]) -> frozenset:
    """What it finds where nothing is on, with and without inference_mode."""
    found = []

    def find():
        with torch.inference_mode(False):
            found.append(function())
        with torch.inference_mode():
            found.append(function())

    thread = threading.Thread(target=find)
    thread.start()
    thread.join()
    return frozenset(found)


@functools.cache
def _plain_states() -> frozenset[tuple[int, int]]:
    return _on_a_new_thread(_state)


@functools.cache
def _plain_keys(device_type: str) -> frozenset[int]:
    """The dispatch keys of tensors that are just memory."""
    if device_type not in ("cpu", "xpu"):
        return frozenset()
    return _on_a_new_thread(lambda: _C._dispatch_keys(torch.empty(0, device=device_type)).raw_repr())


def _known(seen: list[Seen], arguments: Arguments, result) -> Known | None:
    """The call, if it was one of an op on these tensors, and returned what that did or one of the tensors."""
    if len(seen) != 1 or seen[0].repeat is None:
        return None
    repeat, tensors, returned = seen[0]
    places = [place for place, tensor in enumerate(arguments.tensors) if tensor is result]
    if places:
        form = lambda _, own, place=places[0]: own[place]      # noqa: E731
    elif _same(result, returned):
        form = form_of(result)
    elif _is_all_of(result, returned):
        form = lambda results, _, shape=result.shape: results[0].view(shape)      # noqa: E731
    else:
        return None
    known = Known.of(repeat, tensors, arguments, form)
    if known is None:
        return None
    written = [place for place, wrote in zip(known.tensors, repeat.written) if wrote and place >= 0]
    if not written:
        return known

    def counting(results, own):
        written_to(own[place] for place in written)
        return form(results, own)

    return known._replace(form=counting)


def _is_all_of(result, returned) -> bool:
    """Whether it is the same memory in another shape."""
    return (isinstance(result, torch.Tensor) and isinstance(returned, torch.Tensor) and result.data_ptr() == returned.data_ptr() and
            result.dtype == returned.dtype and result.numel() == returned.numel() and result.is_contiguous() and returned.is_contiguous())


def _same(result, returned) -> bool:
    if isinstance(result, torch.Tensor) or isinstance(returned, torch.Tensor):
        return result is returned
    return isinstance(result, tuple) and isinstance(returned, tuple) and len(result) == len(returned) and \
        all(x is y for x, y in zip(result, returned))
