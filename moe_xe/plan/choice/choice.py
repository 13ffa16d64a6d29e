"""What a caller says about configurations: nothing, one for each GEMM, or that the tuner shall choose."""
from __future__ import annotations

import functools
from dataclasses import dataclass

from ..gemm.config import TileConfig
from ..outer.config import OuterConfig
from .block_config import GemmConfigs, MoeConfig
from .text import from_text, to_text

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """config: the caller's, None for moe_xe's choice; autotune: which is the tuner's then."""
    config: TileConfig | OuterConfig | GemmConfigs | MoeConfig | None = None
    autotune: bool = False

    @staticmethod
    def of(config, autotune: bool, *kinds: type) -> Choice:
        """Of an op's arguments `config` and `autotune`. Raises TypeError or ValueError naming them."""
        if not isinstance(autotune, bool):
            raise TypeError(f"autotune must be True or False, got {autotune!r}")
        if config is not None and not isinstance(config, kinds):
            raise TypeError(f"config must be a {' or '.join(kind.__name__ for kind in kinds)}, or None, got {type(config).__name__}")
        if config is not None and autotune:
            raise ValueError(f"config must be None with autotune=True, got {config}")
        return Choice(config, autotune)

    def part(self, name: str) -> Choice:
        """Of one of the GEMMs: a field's name of MoeConfig or GemmConfigs."""
        if isinstance(self.config, TileConfig):
            return self if name == "forward" else Choice()
        return Choice(getattr(self.config, name, None), self.autotune)

    @property
    def arguments(self) -> dict[str, object]:
        """As a public function's arguments."""
        return {"config": self.config, "autotune": self.autotune}

    @property
    def text(self) -> str:
        """As an op's argument."""
        return "autotune" if self.autotune else "" if self.config is None else to_text(self.config)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Choice:
        """Of an op's argument. Raises ValueError for any other text."""
        return Choice(from_text(text) if text not in ("", "autotune") else None, text == "autotune")
