"""A frozen dataclass as the arguments of an op: its fields are the schema, and no argument list is written a second time."""
from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from ..plan.choice.choice import Choice

__all__ = ["Signature"]

_SCHEMA_TYPES = {torch.Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class _Leaf:
    """One argument of the op: where it lies in the dataclass, and how it is written there and here."""
    path: tuple[str, ...]
    schema_type: str
    encode: Callable[[object], object] | None
    decode: Callable[[object], object] | None

    def read(self, value: object) -> object:
        for name in self.path:
            value = None if value is None else getattr(value, name)
        return value if self.encode is None or value is None else self.encode(value)


class Signature:
    """Of a dataclass whose fields are tensors, plain values, enums, a Choice, or dataclasses of these; each may be optional.

    Fields of a nested dataclass become arguments beside the others. An optional dataclass is None where all of its are.
    """

    def __init__(self, cls: type):
        self._cls = cls
        self._leaves = tuple(_leaves(cls, (), optional=False))
        self.names = tuple(".".join(leaf.path) for leaf in self._leaves)
        self.schema = ", ".join(f"{leaf.schema_type} {'_'.join(leaf.path)}" for leaf in self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def flatten(self, value) -> tuple:
        """The op's arguments."""
        return tuple([leaf.read(value) for leaf in self._leaves])

    def unflatten(self, arguments) -> object:
        """The dataclass again."""
        pairs = zip(self._leaves, arguments, strict=True)
        return _build(self._cls, (a if leaf.decode is None or a is None else leaf.decode(a) for leaf, a in pairs))

    def tensors(self, value) -> dict[str, torch.Tensor]:
        """The tensors that are there, by their names."""
        found = zip(self.names, self.flatten(value), strict=True)
        return {name: tensor for name, tensor in found if isinstance(tensor, torch.Tensor)}


def _fields(cls: type) -> Iterator[tuple[str, type, bool]]:
    """Name, type and whether it is optional."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        union = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        rest = [part for part in union if part is not type(None)]
        if len(rest) != 1:
            raise TypeError(f"{cls.__name__}.{field.name} must have one type, or be optional, got {kind}")
        yield field.name, rest[0], len(rest) < len(union)


def _is_nested(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind is not Choice


def _leaves(cls: type, path: tuple[str, ...], optional: bool) -> Iterator[_Leaf]:
    for name, kind, own in _fields(cls):
        place, mark = (*path, name), "?" if optional or own else ""
        if _is_nested(kind):
            yield from _leaves(kind, place, optional or own)
        elif kind is Choice:
            yield _Leaf(place, "str" + mark, lambda choice: choice.text, Choice.parse)
        elif issubclass(kind, Enum):
            yield _Leaf(place, "str" + mark, lambda member: member.value, kind)
        else:
            yield _Leaf(place, _SCHEMA_TYPES[kind] + mark, None, None)


def _build(cls: type, values: Iterator, optional: bool = False):
    fields = {name: _build(kind, values, own) if _is_nested(kind) else next(values) for name, kind, own in _fields(cls)}
    return None if optional and all(value is None for value in fields.values()) else cls(**fields)
