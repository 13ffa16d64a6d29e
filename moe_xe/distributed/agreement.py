"""What ranks tell each other before rows travel: one message each, which all gather, and one look of the host at it.

Every rank always posts the same collectives, whatever is wrong: a rank with bad arguments posts its error, and who reads it raises, too.
A rank may have assumed what turns out wrong, such as how many experts others have. All see that from the same headers, and repeat.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ..ops.checks import DTYPES
from .group import device_of, usual_device
from .message import WIRES, RowFormat
from .placement import Placement

__all__ = ["Agreement", "Counted", "Header", "agree", "telling", "wants_gradient"]

_PROTOCOL = 1
_WORDS = 64         # of a first message
_ATTEMPTS = 4       # one for each thing that may have been assumed, and the last


@dataclass(frozen=True)
class Header:
    """One rank's part of what must be known: int32 numbers. Fields with `agreed` must be equal on all ranks; it is their name for users.

    error: bytes of the text of this rank's error, which follows instead of counts. words: that its message needs. gradient: 0 without grad
    mode, 1 with, 2 if something requires one. chunks: what it prefers; all take the largest. placement, in_chunks: what its counts are for.
    """
    error: int = 0
    words: int = 0
    num_local_experts: int = 0
    gradient: int = 0
    chunks: int = 1
    placement: int = 0
    in_chunks: int = 1
    hidden_size: int = field(default=0, metadata={"agreed": "H"})
    dtype: int = field(default=0, metadata={"agreed": "dtype"})
    top_k: int = field(default=0, metadata={"agreed": "top_k"})
    num_experts: int = field(default=0, metadata={"agreed": "num_experts"})
    given: int = field(default=0, metadata={"agreed": "experts_of_ranks"})      # the digest of what the caller says
    expand: int = field(default=0, metadata={"agreed": "expand"})
    wire: int = field(default=0, metadata={"agreed": "wire"})
    wire_back: int = field(default=0, metadata={"agreed": "wire_back"})
    protocol: int = field(default=_PROTOCOL, metadata={"agreed": "version of moe_xe.distributed"})

    @staticmethod
    def of(tensors: Iterable[torch.Tensor], there: RowFormat, back: RowFormat, **values: int) -> Header:
        """tensors: what may require a gradient."""
        gradient = 2 if wants_gradient(tensors) else int(torch.is_grad_enabled())
        coded = {"dtype": there.dtype, "wire": there.wire, "wire_back": back.wire}
        numbers = {name: _CODED[name].index(value) for name, value in coded.items()}
        return Header(gradient=gradient, hidden_size=there.hidden_size, **numbers, **values)


def wants_gradient(tensors: Iterable[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


_NUM_FIELDS = len(fields(Header))
_START = _NUM_FIELDS + 1        # behind the header and the number of wrong ids, which the device counts
_AGREED = {entry.name: entry.metadata["agreed"] for entry in fields(Header) if entry.metadata}
_CODED = {"dtype": tuple(DTYPES), "expand": (False, True), "wire": (None, *WIRES), "wire_back": (None, *WIRES)}     # a place is the number


@dataclass(frozen=True)
class Counted:
    """What a rank sends, if placement and chunks are as assumed. counts: int32 [chunks, groups of rows]; wrong: int32 scalar, ids that are
    no expert's. kept: whatever the caller needs of it."""
    counts: torch.Tensor
    wrong: torch.Tensor
    kept: object


@dataclass(frozen=True)
class Agreement:
    """gathered: int32 [ranks, chunks, groups], on the device; rows: the same numbers on the host. recorded: whether autograd sees the
    exchanges, on all ranks."""
    placement: Placement
    recorded: bool
    gathered: torch.Tensor
    rows: list
    kept: object


class _State:
    """Of a group. words, of a message, is the same on all ranks, as it follows from what all have read. The others are guesses."""

    def __init__(self):
        self.words = _WORDS
        self.placements: dict[int, Placement] = {}
        self.chunks: dict[int, int] = {}
        self.headers: dict[tuple, torch.Tensor] = {}


_states: WeakKeyDictionary[dist.ProcessGroup, _State] = WeakKeyDictionary()


def agree(group: dist.ProcessGroup, ids: torch.Tensor, header: Header, placement: Placement | None,
          count: Callable[[torch.Tensor, Placement, int], Counted]) -> Agreement:
    """placement: None if ranks have consecutive experts, header.num_local_experts each. count(ids, placement, chunks): this rank's rows.

    Waits for the device, once. Raises ValueError on all ranks where arguments differ or ids are wrong; RuntimeError where another rank
    told an error.
    """
    state, ranks = _states.setdefault(group, _State()), group.size()
    own = header.num_local_experts
    assumed = placement or state.placements.get(own) or Placement.consecutive([own] * ranks)
    chunks = max(header.chunks, state.chunks.get(header.chunks, 1))
    for _ in range(_ATTEMPTS):
        with telling(group, ids):
            counted = count(ids, assumed, chunks)
            needed = _START + counted.counts.numel()
            told = _numbers(header, words=needed, placement=assumed.digest, in_chunks=chunks)
            message = torch.cat([_on_device(state, told, ids.device), counted.wrong.view(1), counted.counts.flatten()])
        gathered = _gather(group, message, state.words)
        rows = gathered.tolist()       # the host waits here
        headers = [Header(*row[:_NUM_FIELDS]) for row in rows]
        _check(group, headers, rows)
        words = max(header.words for header in headers)
        actual = placement or Placement.consecutive([header.num_local_experts for header in headers])
        agreed = max(header.chunks for header in headers)
        state.placements[own], state.chunks[header.chunks] = actual, agreed
        if words <= state.words and all((header.placement, header.in_chunks) == (actual.digest, agreed) for header in headers):
            shape = ranks, *counted.counts.shape
            table = gathered[:, _START:needed].reshape(shape)
            _check_ids(rows, actual)
            return Agreement(actual, any(header.gradient == 2 for header in headers), table,
                             [_cut(row[_START:needed], shape[2]) for row in rows], counted.kept)
        state.words, assumed, chunks = max(state.words, 1 << (words - 1).bit_length()), actual, agreed
    raise RuntimeError(f"group's ranks did not agree in {_ATTEMPTS} messages, the last of which said {headers}")


@contextmanager
def telling(group: dist.ProcessGroup, tensor) -> Iterator[None]:
    """An error within is told to the other ranks, which wait for this one's message, and raised. tensor: an argument, from whose device."""
    try:
        yield
    except Exception as error:
        state = _states.setdefault(group, _State())
        text = f"{type(error).__name__}: {error}".encode()[:4 * (state.words - _START)]
        padded = text + bytes(-len(text) % 4)
        words = [int.from_bytes(padded[at:at + 4], "little", signed=True) for at in range(0, len(padded), 4)]
        message = torch.tensor([*_numbers(Header(), error=len(text)), 0, *words], dtype=torch.int32)
        try:
            device = device_of(group, "tensor", tensor)
        except (TypeError, ValueError):
            device = usual_device(group)
        _gather(group, message.to(device), state.words)
        raise


def _numbers(header: Header, **replaced: int) -> tuple[int, ...]:
    return tuple((vars(header) | replaced).values())


def _on_device(state: _State, numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Kept, as a copy to the device may wait for it."""
    key = device, numbers
    if key not in state.headers:
        if len(state.headers) >= 256:
            state.headers.clear()
        state.headers[key] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return state.headers[key]


def _gather(group: dist.ProcessGroup, message: torch.Tensor, words: int) -> torch.Tensor:
    """[ranks, words] of messages that are cut or padded to this length."""
    message = torch.nn.functional.pad(message, (0, words - message.shape[0]))
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(message, group.size(), group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered).view(group.size(), words)


def _check(group: dist.ProcessGroup, headers: list[Header], rows: list[list[int]]) -> None:
    for rank, header in enumerate(headers):
        if header.error:
            text = b"".join(word.to_bytes(4, "little", signed=True) for word in rows[rank][_START:])[:header.error]
            raise RuntimeError(f"rank {rank} of the group has an error: {text.decode(errors='ignore')}")
    for name, shown in _AGREED.items():
        values = [getattr(header, name) for header in headers]
        _check_equal(shown, [_CODED[name][value] for value in values] if name in _CODED else values)
    modes = [header.gradient for header in headers]
    if 2 in modes and 0 in modes:
        _check_equal("whether gradients are asked for (torch.no_grad)", [mode > 0 for mode in modes])


def _check_equal(name: str, values: list) -> None:
    if len(set(values)) > 1:
        ranks = {value: [rank for rank, other in enumerate(values) if other == value] for value in dict.fromkeys(values)}
        found = "; ".join(f"{value} on {_listed(of_value)}" for value, of_value in ranks.items())
        raise ValueError(f"{name} must be the same on all ranks of the group, got {found}")


def _check_ids(rows: list[list[int]], placement: Placement) -> None:
    wrong = {rank: row[_NUM_FIELDS] for rank, row in enumerate(rows) if row[_NUM_FIELDS]}
    if wrong:
        raise ValueError(f"topk_ids must lie in [0, {placement.num_experts}), or be -1 or {placement.num_experts} for no expert, "
                         f"but {sum(wrong.values())} on {_listed(list(wrong))} do not")


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _cut(numbers: list[int], length: int) -> list[list[int]]:
    return [numbers[at:at + length] for at in range(0, len(numbers), length)]
