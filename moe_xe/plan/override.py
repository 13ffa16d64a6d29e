"""Configurations that tests and experiments force upon every launch, whatever the callers and the heuristics say."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from .gemm.config import TileConfig
from .outer.config import OuterConfig

__all__ = ["force_config", "forced_config", "forced_configs"]

Kind = TypeVar("Kind", TileConfig, OuterConfig)
_forced: ContextVar[tuple[TileConfig | OuterConfig, ...]] = ContextVar("moe_xe_forced_configs", default=())


@contextmanager
def force_config(*configs: TileConfig | OuterConfig) -> Iterator[None]:
    """Within the block every grouped GEMM uses the TileConfig among them, every gradient of weights the OuterConfig."""
    token = _forced.set((*configs, *_forced.get()))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_configs() -> tuple[TileConfig | OuterConfig, ...]:
    """All of them, the innermost first."""
    return _forced.get()


def forced_config(kind: type[Kind]) -> Kind | None:
    """The innermost one of this kind."""
    return next((config for config in _forced.get() if isinstance(config, kind)), None)
