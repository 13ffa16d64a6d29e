"""By what a call is known again: the key of its arguments, and of what else its plan depends on."""
from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import is_dataclass
from enum import Enum

import torch

from ..plan.gemm.heuristics import ISA_VARIABLE
from ..plan.override import forced_configs
from .tuned import prints_configs

__all__ = ["Arguments", "arguments_of"]


class NotRepeatable(Exception):
    """An argument of a kind that says nothing about a later one."""


class Arguments:
    """What of a call's arguments is its own, tensors, and what it has in common with its repetitions, the key.

    The key has for each value what says of which kind it is, and then as much as that kind has: no two lists of values have one key.
    """

    _ALIGNMENT = 64             # of what a plan depends on: the base of a surface
    _BYTES_ALIGNMENT = 256      # of a workspace, whose pieces begin at multiples of it
    _PLAIN = frozenset((type(None), bool, int, str, torch.dtype))

    def __init__(self, values: Iterable, *more: Hashable, is_plain: Callable[[torch.Tensor], bool] | None = None):
        """Raises NotRepeatable, also for a tensor that is not plain."""
        self.tensors: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self._is_plain = is_plain
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
            elif kind is tuple or kind is list:
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


def arguments_of(values: Iterable, *more: Hashable, is_plain: Callable[[torch.Tensor], bool] | None = None) -> Arguments | None:
    """Of a call that may be repeated, else None. more: what else is part of its key; so is what
    plans depend on besides arguments."""
    if prints_configs():
        return None
    around = os.environ.get(ISA_VARIABLE), forced_configs(), torch.get_float32_matmul_precision()
    try:
        return Arguments(values, *more, *around, is_plain=is_plain)
    except NotRepeatable:
        return None
