"""Calls that were made before: what an equal one need not check, plan and look up again.

A call is known by its key: the shapes, strides, dtypes, devices and alignments of its tensors, its other arguments, and what else
a plan depends on. What differs in anything is another call, with all checks.
"""
from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from enum import Enum
from typing import NamedTuple

import torch

from ..device import queue_for
from ..jit.compiler import kernels_in_memory
from ..once import AfterFork, once
from ..plan.gemm.heuristics import ISA_VARIABLE
from ..plan.override import forced_configs
from .submission import Repeat, Submission, extent, place_of
from .tuned import prints_configs

__all__ = ["Arguments", "Known", "known_calls", "repeated", "seen_calls", "surroundings"]

MOST_CALLS = 4096     # of some KB each


class NotRepeatable(Exception):
    """An argument of a kind that says nothing about a later one."""


class Arguments:
    """What of a call's arguments is its own, tensors, and what it has in common with its repetitions, the key."""

    _ALIGNMENT = 64             # of what a plan depends on: the base of a surface
    _BYTES_ALIGNMENT = 256      # of a workspace, whose pieces begin at multiples of it
    _PLAIN = frozenset((type(None), bool, int, str, torch.dtype, type))

    def __init__(self, values: Iterable, *more: Hashable, is_plain: Callable[[torch.Tensor], bool] | None = None):
        """Raises NotRepeatable, also for a tensor that is not plain."""
        self.tensors: list[torch.Tensor] = []
        self._is_plain = is_plain
        self.addresses: list[int] = []
        key: list[Hashable] = [*more]
        self._add(values, key)
        self.key = tuple(key)

    def _add(self, values: Iterable, key: list) -> None:
        for value in values:
            kind = type(value)
            if kind is torch.Tensor or isinstance(value, torch.Tensor):
                if self._is_plain is not None and not self._is_plain(value):
                    raise NotRepeatable
                address, dtype = value.data_ptr(), value.dtype
                self.tensors.append(value)
                self.addresses.append(address)
                alignment = self._BYTES_ALIGNMENT if dtype is torch.uint8 else self._ALIGNMENT
                key += (value.shape, value.stride(), dtype, value.device, address % alignment)
            elif kind in self._PLAIN:
                key += (kind, value)        # as True == 1
            elif kind is float:
                key.append(value.hex())     # as 0.0 == -0.0
            elif kind is tuple:
                key += (kind, len(value))
                self._add(value, key)
            elif isinstance(value, Enum):
                key.append(value)
            elif is_dataclass(value):
                key.append(kind)
                self._add(vars(value).values(), key)
            else:
                raise NotRepeatable

    def have_memory(self, extents: Iterable[int]) -> bool:
        """Whether there is memory behind so many bytes of each tensor: a storage can be freed and cut, and be none."""
        for tensor, address, num_bytes in zip(self.tensors, self.addresses, extents):
            offset = tensor.storage_offset() * tensor.itemsize
            if num_bytes and (address == offset or tensor.untyped_storage().nbytes() < offset + num_bytes):
                return False
        return True


def surroundings() -> tuple | None:
    """What plans depend on besides a call's arguments; None where a repetition would leave something out."""
    if prints_configs():
        return None
    return os.environ.get(ISA_VARIABLE), forced_configs(), torch.get_float32_matmul_precision()


class Known(NamedTuple):
    """A call that can be repeated. tensors: which of the caller's are the launches', -1 for an empty one; all that the caller's
    have is `extents`. form: of the new results, or of the caller's tensor that is the result, makes what the call returns."""
    repeat: Repeat
    tensors: tuple[int, ...]
    extents: tuple[int, ...]
    form: Callable[[list[torch.Tensor], list[torch.Tensor]], object]

    def call(self, arguments: Arguments) -> tuple[bool, object]:
        """Whether it was repeated, and what the call returns."""
        repeat = self.repeat
        if not arguments.have_memory(self.extents):
            return False, None
        queue = queue_for(repeat.device)
        if place_of(queue) != repeat.place:
            return False, None
        addresses = arguments.addresses
        results = repeat.run(queue, [addresses[place] if place >= 0 else 0 for place in self.tensors])
        return (False, None) if results is None else (True, self.form(results, arguments.tensors))

    @staticmethod
    def of(repeat: Repeat, tensors: Iterable[torch.Tensor], arguments: Arguments, form: Callable) -> Known | None:
        """Of a repeat on `tensors`, which a caller has given as `arguments`; None where it does not say which is which."""
        places = []
        for tensor in tensors:
            address = tensor.data_ptr()
            same = [place for place, other in enumerate(arguments.addresses) if other == address] if tensor.numel() else [-1]
            if len(same) != 1:
                return None
            places.append(same[0])
        return Known(repeat, tuple(places), tuple(map(extent, arguments.tensors)), form)


class Calls(AfterFork):
    """Key -> call, the least recently used of which leave beyond `most`, and where they use more than `most_kernels` kernels."""

    def __init__(self, most_kernels: int, most: int = MOST_CALLS):
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self._kernels: Counter = Counter()
        self._most, self._most_kernels = most, most_kernels
        super().__init__()

    def get(self, key: Hashable) -> Known | None:
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        return known

    def put(self, key: Hashable, known: Known) -> None:
        with self._lock:
            self._forget(key)
            self._known[key] = known
            self._kernels.update(known.repeat.kernels)
            while len(self._known) > 1 and (len(self._known) > self._most or len(self._kernels) > self._most_kernels):
                self._forget(next(iter(self._known)))

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
            self._kernels.clear()

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, key: Hashable) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            for kernel in known.repeat.kernels:
                self._kernels[kernel] -= 1
                if not self._kernels[kernel]:
                    del self._kernels[kernel]


@once
def known_calls() -> Calls:
    """Those of this process."""
    return Calls(kernels_in_memory())


class Seen(NamedTuple):
    """A call of an op, as the public function that led to it sees it."""
    repeat: Repeat | None
    tensors: list[torch.Tensor]
    result: object


_seen: ContextVar[list[Seen] | None] = ContextVar("moe_xe_seen_calls", default=None)


@contextmanager
def seen_calls():
    """A list of the calls of ops within the block, on this thread."""
    token = _seen.set(seen := [])
    try:
        yield seen
    finally:
        _seen.reset(token)


def repeated(name: str, body: Callable, written: Iterable[int]) -> Callable:
    """The kernel of an op whose work is done by launches. body(submission, *arguments) -> results makes them.

    written: the places of the arguments that are written to.
    """
    written = frozenset(written)

    def kernel(*values):
        around = surroundings()
        try:
            arguments = None if around is None else Arguments(values, name, around)
        except NotRepeatable:
            arguments = None
        calls = known_calls()
        known = None if arguments is None else calls.get(arguments.key)
        if known is not None:
            done, result = known.call(arguments)
            if done:
                return _noted(known.repeat, arguments, result)
        device = next(value.device for value in values if isinstance(value, torch.Tensor))
        with Submission(queue_for(device), device) as submission:
            result = body(submission, *values)
        repeat = None
        if arguments is not None:
            wrote = [place in written for place, value in enumerate(values) if isinstance(value, torch.Tensor)]
            repeat = submission.repeat(arguments.tensors, wrote, _tensors_of(result))
            if repeat is not None:
                places = tuple(range(len(arguments.tensors)))
                calls.put(arguments.key, Known(repeat, places, repeat.extents, form_of(result)))
        return _noted(repeat, arguments, result)

    return kernel


def _noted(repeat: Repeat | None, arguments: Arguments | None, result):
    seen = _seen.get()
    if seen is not None:
        seen.append(Seen(repeat, [] if arguments is None else arguments.tensors, result))
    return result


def _tensors_of(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result or ())


def form_of(result) -> Callable:
    """From new results, and a caller's tensors, to what such a call returns."""
    if result is None:
        return lambda results, tensors: None
    if isinstance(result, torch.Tensor):
        return lambda results, tensors: results[0]
    make = getattr(type(result), "_make", type(result))
    return lambda results, tensors: make(results)
