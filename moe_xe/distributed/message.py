"""What travels of a row, as one run of float32 words: its numbers, or codes and their scale, and its ids and weights."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..plan.gemm.heuristics import SURFACE_BASE_ALIGNMENT

__all__ = ["RowFormat", "WIRES"]


@dataclass(frozen=True)
class Wire:
    """Codes with a scale a row: the largest code is the row's largest number."""
    dtype: torch.dtype
    largest: float

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [n, H] and scales [n, 1]. A row that has an infinity or a NaN has no finite scale, and comes out as NaN."""
        scales = rows.abs().amax(1, keepdim=True).float() / self.largest
        codes = rows.float() / torch.where(scales == 0, 1.0, scales)
        codes = codes.round() if self.dtype is torch.int8 else codes
        return codes.nan_to_num(0.0, 0.0, 0.0).clamp(-self.largest, self.largest).to(self.dtype), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (codes.float() * scales).to(dtype)


WIRES = {"int8": Wire(torch.int8, 127.0), "fp8_e4m3": Wire(torch.float8_e4m3fn, 448.0)}


@dataclass(frozen=True)
class RowFormat:
    """hidden_size numbers of dtype, sent as `wire` says (None: as they are); num_ids int32 and num_weights float32 behind them."""
    hidden_size: int
    dtype: torch.dtype
    num_ids: int = 0
    num_weights: int = 0
    wire: str | None = None

    def __post_init__(self):
        if self.wire is not None and self.wire not in WIRES:
            raise ValueError(f"wire and wire_back must be None, {' or '.join(map(repr, WIRES))}, got {self.wire!r}")

    @property
    def of_gradients(self) -> RowFormat:
        """Ids have none, and the others travel in their own precision."""
        return replace(self, num_ids=0, wire=None)

    @property
    def _sent(self) -> torch.dtype:
        return self.dtype if self.wire is None else WIRES[self.wire].dtype

    @property
    def _tail(self) -> int:
        """The word behind the numbers."""
        return -(-self.hidden_size * self._sent.itemsize // 4)

    @property
    def words(self) -> int:
        used = self._tail + (self.wire is not None) + self.num_ids + self.num_weights
        words = SURFACE_BASE_ALIGNMENT // 4     # so that 2D block loads can read rows where they came
        return -(-used // words) * words

    def pack(self, rows: torch.Tensor, ids: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> torch.Tensor:
        """rows [n, H], ids and weights [n, k] -> [n, words]."""
        if self.words * 4 == self.hidden_size * self._sent.itemsize:
            return rows.contiguous().view(torch.float32)
        message = rows.new_empty(rows.shape[0], self.words, dtype=torch.float32)
        numbers, scales, to_ids, to_weights = self._parts(message)
        if self.wire is None:
            numbers.copy_(rows)
        else:
            codes, row_scales = WIRES[self.wire].encode(rows)
            numbers.copy_(codes)
            scales.copy_(row_scales)
        if self.num_ids:
            to_ids.copy_(ids)
        if self.num_weights:
            to_weights.zero_() if weights is None else to_weights.copy_(weights)
        return message

    def unpack(self, message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """[n, words] -> rows, ids and weights, most of them views of the message."""
        numbers, scales, ids, weights = self._parts(message)
        rows = numbers if self.wire is None else WIRES[self.wire].decode(numbers, scales, self.dtype)
        return rows, ids if self.num_ids else None, weights if self.num_weights else None

    def _parts(self, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of numbers, scales, ids and weights."""
        numbers = message.view(self._sent)[:, :self.hidden_size]
        sizes = [self._tail, int(self.wire is not None), self.num_ids, self.num_weights]
        _, scales, ids, weights, _ = message.split([*sizes, self.words - sum(sizes)], dim=1)
        return numbers, scales, ids.view(torch.int32), weights
