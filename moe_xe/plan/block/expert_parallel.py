"""How long a block takes whose experts are spread over several ranks: what each computes, and what it sends.

docs/distributed.md has the formulae. Tokens are those of each rank; routing is taken to be uniform, and experts are shared out evenly.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..model.cost import LAUNCH_SECONDS
from ..model.devices import DeviceRecord
from ..model.links import Link, exchange_seconds
from .cost import BlockShape, combine_seconds, predict_block, route_seconds, sort_seconds

RowsOf = Callable[[int], Sequence[int]]     # tokens of all ranks -> rows of each expert
# Kernels beside the block's: once, to look up ranks and tell counts; of each chunk, to sort its tokens, pack, unpack and sum rows. Counted, within a
# quarter (tests/distributed/test_launches.py).
ONCE_LAUNCHES, CHUNK_LAUNCHES = 19, 13
WAIT_SECONDS = 2 * LAUNCH_SECONDS       # of the host for the counts, until the stream goes on: assumed
COUNT_BYTES = 4         # of a rank and chunk, in the message that says who sends how much


def local_experts(shape: BlockShape, ranks: int) -> int:
    """Of the rank with the most."""
    return -(-shape.num_experts // ranks)


def share_of_tokens(shape: BlockShape, ranks: int) -> float:
    """Of the tokens, those with one of a rank's experts or more.

    A token has one of the C(E, k) sets of k experts, all alike; C(E - e, k) of them have none of the rank's e.
    """
    experts, k = shape.num_experts, shape.top_k
    return 1 - math.comb(experts - local_experts(shape, ranks), k) / math.comb(experts, k)


def pipelined(dispatch: float, compute: float, combine: float, chunks: int) -> float:
    """Seconds of equal chunks, each dispatched, computed and combined: one link, one device, each busy with one thing at a time.

    All dispatches are started first, and the way back of a chunk as soon as it is computed.
    """
    link = dispatch * chunks
    device = 0.0
    for chunk in range(1, chunks + 1):
        device = max(device, dispatch * chunk) + compute
        link = max(link, device) + combine
    return link


@dataclass(frozen=True)
class LayerPrediction:
    """One layer on one of the ranks. compute: seconds without communication, in one chunk; communication: of both ways and of the agreement,
    if nothing hid them. sent_bytes: by a rank, both ways; pair_bytes: if each (token, expert) pair were sent by itself."""
    ranks: int
    chunks: int
    seconds: float
    compute: float
    communication: float
    sent_bytes: float
    pair_bytes: float

    @property
    def share(self) -> float:
        """Of the layer, what communication and cutting into chunks add to computing."""
        return 1 - self.compute / self.seconds

    @property
    def hidden(self) -> float:
        """Of communication, what computing hides, less what chunks cost; 0 for one chunk."""
        return 1 - (self.seconds - self.compute) / self.communication if self.chunks > 1 else 0.0


def predict_layer(shape: BlockShape, num_tokens: int, ranks: int, rows_of: RowsOf, device: DeviceRecord, link: Link, network: Link,
                  row_bytes: tuple[int, int], chunks: int = 1) -> LayerPrediction:
    """Of the rank with the most rows; of one rank, `predict_block`. row_bytes: of a token's row to a rank, and of the one back. ValueError
    for a device that is no Xe GPU."""
    if ranks == 1:
        seconds = predict_block(shape, num_tokens, rows_of(num_tokens), device).seconds
        return LayerPrediction(1, 1, seconds, seconds, 0.0, 0.0, 0.0)
    route = LAUNCH_SECONDS + route_seconds(shape, num_tokens, device) if shape.routing else 0.0
    once = ONCE_LAUNCHES * LAUNCH_SECONDS + WAIT_SECONDS
    agree = once + exchange_seconds(COUNT_BYTES * chunks * ranks, ranks, link, network)
    tokens = -(-num_tokens // chunks)
    to_each = [tokens * share_of_tokens(shape, ranks) * num_bytes for num_bytes in row_bytes]
    ways = [exchange_seconds(num_bytes, ranks, link, network) for num_bytes in to_each]
    on_device = chunk_seconds(shape, tokens, ranks, rows_of(tokens * ranks), device)
    whole = on_device if chunks == 1 else chunk_seconds(shape, num_tokens, ranks, rows_of(num_tokens * ranks), device)
    row_in_elements = 2 * shape.hidden_size * shape.dtype.size
    return LayerPrediction(ranks, chunks, route + agree + pipelined(ways[0], on_device, ways[1], chunks), route + whole,
                           agree + chunks * sum(ways), (ranks - 1) * chunks * sum(to_each),
                           (ranks - 1) / ranks * num_tokens * shape.top_k * row_in_elements)


def chunk_seconds(shape: BlockShape, num_tokens: int, ranks: int, rows: Sequence[int], device: DeviceRecord) -> float:
    """What a rank computes for a chunk: its own tokens' sort by rank, copies of their rows both ways, and the sum of what comes back; and
    the block of its experts. rows: of all experts, from all ranks."""
    local, share = local_experts(shape, ranks), share_of_tokens(shape, ranks)
    rows = max((rows[first:first + local] for first in range(0, len(rows), local)), key=sum)
    sent = round(ranks * num_tokens * share)
    block = predict_block(replace(shape, num_experts=local, routing=False), max(sent, *rows), rows, device)
    copies = 2 * 2 * sent * shape.hidden_size * shape.dtype.size / (device.bandwidth * 1e9)
    sort = sort_seconds(replace(shape, num_experts=ranks), num_tokens, device)
    combine = combine_seconds(replace(shape, y=shape.dtype), num_tokens, device, sent)
    return block.seconds + CHUNK_LAUNCHES * LAUNCH_SECONDS + copies + sort + combine
