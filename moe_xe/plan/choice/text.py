"""Configurations as JSON text and back, for files, op arguments and commands."""
from __future__ import annotations

import dataclasses
import functools
import json
from enum import Enum

from ..gemm.config import CpuConfig, GenericConfig, XeConfig, field_types
from ..outer.config import OuterCpuConfig, OuterGenericConfig, OuterXeConfig
from .block_config import GemmConfigs, MoeConfig

__all__ = ["from_text", "to_text"]

KINDS = {kind.__name__: kind for kind in (XeConfig, GenericConfig, CpuConfig, OuterXeConfig, OuterGenericConfig, OuterCpuConfig,
                                          GemmConfigs, MoeConfig)}


@functools.lru_cache(maxsize=1024)
def to_text(config) -> str:
    """One line of JSON: the fields, and "kind", the name of the class. (torch.compile traces it, but not json.dumps.)"""
    return _text(config)


def from_text(text: str):
    """The configuration of such a text. Raises ValueError that says what is wrong with it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a configuration must be JSON, got {text!r}: {error}") from error
    try:
        return _config(data)
    except RecursionError as error:
        raise ValueError(f"a configuration must be less deep, got {text!r}") from error


def _text(value) -> str:
    if dataclasses.is_dataclass(value):
        fields = (f', "{field.name}": {_text(getattr(value, field.name))}' for field in dataclasses.fields(value))
        return f'{{"kind": "{type(value).__name__}"{"".join(fields)}}}'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, int):
        return "null" if value is None else str(value)
    return f'"{value.value if isinstance(value, Enum) else value}"'


def _config(data):
    name = data.get("kind") if isinstance(data, dict) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"a configuration must have a kind of {', '.join(KINDS)}, got {data!r}")
    values, types = {name: value for name, value in data.items() if name != "kind"}, field_types(kind)
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if not required <= values.keys() <= types.keys():
        raise ValueError(f"a {kind.__name__} must have the fields {', '.join(types)}, got {', '.join(map(repr, values)) or 'none'}")
    try:
        return kind(**{name: _field(value, types[name]) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"a {kind.__name__} is wrong: {error}") from error


def _field(value, hint):
    """What JSON has no type for; the configuration's class says what is wrong with any other value."""
    if isinstance(value, dict):
        return _config(value)
    if isinstance(hint, type) and issubclass(hint, Enum) and value in [member.value for member in hint]:
        return hint(value)
    return tuple(value) if isinstance(value, list) else value
