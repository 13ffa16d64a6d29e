"""A frozen dataclass as the arguments of an op: its fields are the schema, and no argument list is written a second time."""
from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from ..plan.choice.choice import Choice

__all__ = ["SavedArguments", "Signature"]

_SCHEMA_TYPES = {torch.Tensor: "Tensor", bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class _Leaf:
    """One argument of the op: its name, how it is read from the dataclass, and how it is written there and here."""
    name: str
    schema_type: str
    get: Callable[[object], object]
    encode: Callable[[object], object] | None
    decode: Callable[[object], object] | None

    def read(self, value: object) -> object:
        value = self.get(value)
        return value if self.encode is None or value is None else self.encode(value)


class Signature:
    """Of a dataclass whose fields are tensors, plain values, enums, a Choice, or dataclasses of these; each may be optional.

    Fields of a nested dataclass become arguments beside the others. An optional dataclass is None where all of its are. A field may also
    be a tensor or a dataclass: then the dataclass's first field, a tensor too, is the argument of the field's name, and the others are None for a
    tensor alone. A dataclass's plain fields that it names in JOINED are one argument, a text: an op has 64 at most.
    """

    def __init__(self, cls: type):
        self._cls = cls
        self._leaves = tuple(_leaves(cls, "", lambda value: value, optional=False))
        self.names = tuple(leaf.name for leaf in self._leaves)
        self.schema = ", ".join(f"{leaf.schema_type} {leaf.name.replace('.', '_')}" for leaf in self._leaves)

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


class _Field(NamedTuple):
    """Name and type of a field, whether it is optional, and whether it may be a tensor instead of that type."""
    name: str
    kind: type
    optional: bool
    or_tensor: bool


def _fields(cls: type) -> Iterator[_Field]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        union = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        rest = [part for part in union if part is not type(None)]
        or_tensor = len(rest) == 2 and torch.Tensor in rest
        if or_tensor:
            rest.remove(torch.Tensor)
        if len(rest) != 1 or (or_tensor and not _is_nested(rest[0])):
            raise TypeError(f"{cls.__name__}.{field.name} must have one type, or be a tensor or a dataclass, or be optional, got {kind}")
        yield _Field(field.name, rest[0], len(rest) + or_tensor < len(union), or_tensor)


def _is_nested(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) and kind is not Choice


def _own_fields(cls: type) -> Iterator[_Field]:
    return (field for field in _fields(cls) if field.name not in _joined(cls))


def _joined(cls: type) -> tuple[str, ...]:
    return getattr(cls, "JOINED", ())


def _leaves(cls: type, prefix: str, get: Callable[[object], object], optional: bool) -> Iterator[_Leaf]:
    for field in _own_fields(cls):
        place, mark, kind = prefix + field.name, "?" if optional or field.optional else "", field.kind
        read = _attribute(get, field.name)
        if field.or_tensor:
            (first, *others) = _leaves(kind, place + ".", _unless_tensor(read), True)
            yield _Leaf(place, "Tensor" + mark, _tensor_or(read, first.get), None, None)
            yield from others
        elif _is_nested(kind):
            yield from _leaves(kind, place + ".", read, optional or field.optional)
        elif kind is Choice:
            yield _Leaf(place, "str" + mark, read, lambda choice: choice.text, Choice.parse)
        elif kind == tuple[int, int]:
            yield _Leaf(place, "int[]" + mark, read, list, tuple)
        elif issubclass(kind, Enum):
            yield _Leaf(place, "str" + mark, read, lambda member: member.value, kind)
        else:
            yield _Leaf(place, _SCHEMA_TYPES[kind] + mark, read, None, None)
    if joined := _joined(cls):
        yield _Leaf(prefix + "plain", "str" + ("?" if optional else ""), get,
                    lambda value: repr(tuple([getattr(value, name) for name in joined])), ast.literal_eval)


def _attribute(get: Callable, name: str) -> Callable:
    def read(value):
        value = get(value)
        return None if value is None else getattr(value, name)

    return read


def _unless_tensor(get: Callable) -> Callable:
    def read(value):
        value = get(value)
        return None if isinstance(value, torch.Tensor) else value

    return read


def _tensor_or(get: Callable, first: Callable) -> Callable:
    def read(value):
        found = get(value)
        return found if isinstance(found, torch.Tensor) else first(value)

    return read


def _build(cls: type, values: Iterator, optional: bool = False, or_tensor: bool = False):
    fields = {field.name: _build(field.kind, values, field.optional, field.or_tensor) if _is_nested(field.kind) else next(values)
              for field in _own_fields(cls)}
    if _joined(cls) and (joined := next(values)) is not None:
        fields |= zip(_joined(cls), joined)
    first, *others = fields.values()
    if or_tensor and all(value is None for value in others):
        return first
    return None if optional and all(value is None for value in fields.values()) else cls(**fields)


class SavedArguments:
    """The arguments of an op between its forward and its backward pass: autograd keeps the tensors, and this the rest."""

    def __init__(self, ctx, arguments: tuple, *more: torch.Tensor):
        """more: tensors behind the arguments."""
        arguments = (*arguments, *more)
        self._others = [None if isinstance(value, torch.Tensor) else value for value in arguments]
        self._is_tensor = [isinstance(value, torch.Tensor) for value in arguments]
        ctx.save_for_backward(*(value for value in arguments if isinstance(value, torch.Tensor)))

    def of(self, ctx) -> list:
        """All of them."""
        tensors = iter(ctx.saved_tensors)
        return [next(tensors) if is_tensor else value for value, is_tensor in zip(self._others, self._is_tensor)]
