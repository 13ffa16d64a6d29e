"""Configurations as JSON text and back, for files, op arguments and commands."""
from __future__ import annotations

import dataclasses
import functools
import json
import typing
from enum import Enum

from .block_config import GemmConfigs, MoeConfig
from .config import CpuConfig, GenericConfig, XeConfig
from .outer import OuterCpuConfig, OuterGenericConfig, OuterXeConfig

__all__ = ["from_text", "to_text"]

KINDS = {kind.__name__: kind for kind in (XeConfig, GenericConfig, CpuConfig, OuterXeConfig, OuterGenericConfig, OuterCpuConfig,
                                          GemmConfigs, MoeConfig)}


@functools.lru_cache(maxsize=1024)
def to_text(config) -> str:
    """One line of JSON: the fields, and "kind", the name of the class."""
    return json.dumps(_plain(config))


def from_text(text: str):
    """The configuration of such a text. Raises ValueError that says what is wrong with it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a configuration must be JSON, got {text!r}: {error}") from error
    return _config(data)


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {"kind": type(value).__name__, **{field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}}
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _config(data):
    kind = KINDS.get(data.get("kind")) if isinstance(data, dict) else None
    if kind is None:
        raise ValueError(f"a configuration must have a kind of {', '.join(KINDS)}, got {data!r}")
    values = {name: value for name, value in data.items() if name != "kind"}
    hints = _hints(kind)
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if not required <= values.keys() <= hints.keys():
        raise ValueError(f"a {kind.__name__} must have the fields {', '.join(hints)}, got {', '.join(values) or 'none'}")
    return kind(**{name: _field(f"{kind.__name__}.{name}", value, hints[name]) for name, value in values.items()})


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _field(name: str, value, hint):
    if isinstance(value, dict):
        return _config(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if value not in [member.value for member in hint]:
            raise ValueError(f"{name} must be one of {', '.join(member.value for member in hint)}, got {value!r}")
        return hint(value)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if hint is int and not is_int:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if hint is str and not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {value!r}")
        return tuple(value)
    return value
