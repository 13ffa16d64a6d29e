"""The launches of one call: each is submitted as it is made, and all can be made again for a call like it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..runtime import Kernel, LaunchSequence, Queue

__all__ = ["ALIGNMENT", "Repeat", "Submission", "extent", "padded", "place_of"]

# what each piece of memory in between begins at a multiple of: a surface's base, and a page of the CPU's caches
ALIGNMENT = 256


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first to behind its last element."""
    if not tensor.numel():
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


class _Memory(NamedTuple):
    """Where a piece of memory is in this call, and which bytes of which buffer of a sequence it is."""
    address: int
    num_bytes: int
    buffer: int
    offset: int


class _Result(NamedTuple):
    make: object      # torch.empty or torch.zeros
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Repeat:
    """The launches of a call, for other tensors of the same shapes, strides and dtypes; holds no memory of theirs.

    extents: bytes of each of the call's tensors. space_bytes: of all that lies in between. place: see `place_of`.
    """
    sequence: LaunchSequence
    kernels: frozenset[Kernel]
    place: tuple[int, int]
    device: torch.device
    extents: tuple[int, ...]
    written: tuple[bool, ...]
    results: tuple[_Result, ...]
    space_bytes: int

    def run(self, queue: Queue, addresses: Sequence[int]) -> list[torch.Tensor] | None:
        """The new results, or None, with nothing done, where these tensors want to be checked.

        addresses: of the call's tensors. On xpu it returns once all is submitted, on cpu when it is done.
        """
        device = self.device
        results = [make(shape, dtype=dtype, device=device) for make, shape, dtype in self.results]
        space = torch.empty(self.space_bytes, dtype=torch.uint8, device=device) if self.space_bytes else None
        done = self.sequence.run(queue, (*addresses, *[result.data_ptr() for result in results],
                                         0 if space is None else space.data_ptr()), device.type == "cpu")
        return results if done else None


def place_of(queue: Queue) -> tuple[int, int]:
    """Equal for two queues exactly when compiled kernels fit both."""
    return queue.context_id, queue.device_id


class Submission:
    """Submits to `queue` what works on tensors of `device`. At its end, also after an error, waits on cpu, where memory is not
    freed in stream order.

    All memory that the launches use, but for the call's own tensors, comes from here.
    """

    def __init__(self, queue: Queue, device: torch.device):
        self.queue, self.device = queue, device
        self._launches: list[tuple[Kernel, int, int, tuple]] = []
        self._results: list[tuple[torch.Tensor, _Result]] = []
        self._zeroed: list[torch.Tensor] = []
        self._scratch: list[torch.Tensor] = []
        self._kept: list[object] = []
        self._repeatable = True

    def result(self, *shape: int, dtype: torch.dtype, zeros: bool = False) -> torch.Tensor:
        """A new tensor that the call returns."""
        kind = _Result(torch.zeros if zeros else torch.empty, tuple(shape), dtype)
        result = kind.make(kind.shape, dtype=dtype, device=self.device)
        self._results.append((result, kind))
        return result

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for something in between."""
        self._scratch.append(torch.empty(shape, dtype=dtype, device=self.device))
        return self._scratch[-1]

    def zeros(self, length: int) -> torch.Tensor:
        """int32 zeros, in order of the queue, which may not be torch's stream: they are not used again before the launches' end."""
        if self.device.type == "cpu":
            self._zeroed.append(torch.zeros(length, dtype=torch.int32))
        else:
            self._zeroed.append(torch.empty(length, dtype=torch.int32, device=self.device))
            self.queue.zero(self._zeroed[-1].data_ptr(), self._zeroed[-1].nbytes)
        return self._zeroed[-1]

    def keep(self, *objects: object) -> None:
        """For as long as the launches may use them."""
        self._kept += objects

    def launch(self, kernel: Kernel, num_groups: int, group_size: int, arguments: tuple) -> None:
        """Submits one kernel; the arguments are Kernel.launch's."""
        kernel.launch(self.queue, num_groups, group_size, arguments)
        self._launches.append((kernel, num_groups, group_size, arguments))

    def cannot_be_repeated(self) -> None:
        """Something other than these launches is part of the call: it cannot be repeated."""
        self._repeatable = False

    def wait(self) -> None:
        """For what torch reads next; on xpu it does so in stream order."""
        self.cannot_be_repeated()
        if self.device.type == "cpu":
            self.queue.wait()

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cpu":
            self.queue.wait()

    def repeat(self, tensors: Sequence[torch.Tensor], written: Sequence[bool], results: Sequence[torch.Tensor]) -> Repeat | None:
        """The launches for other tensors instead of these, the call's own; None where that would not be the same call.

        results: what the call returns, which must come from here.
        """
        made = [result for result, _ in self._results]
        if not self._repeatable or len(made) != len(results) or any(x is not y for x, y in zip(made, results)):
            return None
        memory, space_bytes, zeroed_bytes = self._memory([*tensors, *made])
        extents = [extent(tensor) for tensor in tensors]
        sequence = LaunchSequence([*((num_bytes, wrote, 0) for num_bytes, wrote in zip(extents, written)),
                                   *((extent(result), False, 0) for result in made), (space_bytes, False, zeroed_bytes)])
        for kernel, num_groups, group_size, arguments in self._launches:
            pointers = []
            for index, (letter, value) in enumerate(zip(kernel.signature, arguments)):
                if letter == "p" and value:
                    found = _find(memory, value)
                    if found is None:
                        return None
                    pointers.append((index, *found))
            sequence.add(kernel, num_groups, group_size, arguments, pointers)
        kernels = frozenset(kernel for kernel, *_ in self._launches)
        return Repeat(sequence, kernels, place_of(self.queue), self.device, tuple(extents), tuple(written),
                      tuple(kind for _, kind in self._results), space_bytes)

    def _memory(self, buffers: Sequence[torch.Tensor]) -> tuple[list[_Memory], int, int]:
        """The pieces of memory, with what lies in between in one more buffer; the bytes of that, and how many begin as zeros."""
        memory = [_Memory(buffer.data_ptr(), extent(buffer), place, 0) for place, buffer in enumerate(buffers)]
        used = zeroed_bytes = 0
        for piece in (*self._zeroed, *self._scratch):
            memory.append(_Memory(piece.data_ptr(), extent(piece), len(buffers), used))
            used += padded(memory[-1].num_bytes)
            if len(memory) == len(buffers) + len(self._zeroed):
                zeroed_bytes = used
        return memory, used, zeroed_bytes


def _find(memory: Sequence[_Memory], pointer: int) -> tuple[int, int] | None:
    """Buffer and offset of a pointer into the memory: that of the only piece which begins there or, if none does, the only one
    in which it lies."""
    begins = [piece for piece in memory if piece.num_bytes and piece.address == pointer]
    found = begins or [piece for piece in memory if piece.address <= pointer < piece.address + piece.num_bytes]
    return (found[0].buffer, pointer - found[0].address + found[0].offset) if len(found) == 1 else None
