"""The configurations of several launches: of a GEMM with its gradients, and of an MoE MLP's two GEMMs."""
from __future__ import annotations

from dataclasses import dataclass, fields

from ..gemm.config import TileConfig
from ..outer.config import OuterConfig

__all__ = ["GemmConfigs", "MoeConfig"]


def _check(owner: object, name: str, kinds: tuple[type, ...]) -> None:
    value = getattr(owner, name)
    if value is not None and not isinstance(value, kinds):
        raise TypeError(f"{name} must be a {' or '.join(kind.__name__ for kind in kinds)}, or None, got {type(value).__name__}")


@dataclass(frozen=True)
class GemmConfigs:
    """Of one grouped GEMM and its gradients; None: as moe_xe chooses. dX is a GEMM with the transposed weights."""
    forward: TileConfig | None = None
    dX: TileConfig | None = None
    dW: OuterConfig | None = None

    def __post_init__(self):
        for name, kind in (("forward", TileConfig), ("dX", TileConfig), ("dW", OuterConfig)):
            _check(self, name, (kind,))


@dataclass(frozen=True)
class MoeConfig:
    """Of the two grouped GEMMs of an MoE MLP: with w13 and with w2. A TileConfig is that of the forward GEMM."""
    gate_up: GemmConfigs | TileConfig | None = None
    down: GemmConfigs | TileConfig | None = None

    def __post_init__(self):
        for field in fields(self):
            _check(self, field.name, (GemmConfigs, TileConfig))
