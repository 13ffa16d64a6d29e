"""What connects the ranks of a group: the records behind the predictions of expert parallelism.

Nothing here was measured by this project. GB/s are of payload, of one direction while the other is as busy.
"""
from __future__ import annotations

from dataclasses import dataclass

_LATENCY = "ai-dynamo/aiconfigurator PR #1301: 2 us, a round trip over PCIe as kernels on Arc Pro B60 see it"
_PAYLOAD = "of which 90 % are payload (aiconfigurator PR #1301: 28.4 GB/s at most on B60's x8)"


@dataclass(frozen=True)
class Link:
    """bandwidth: GB/s that a rank sends to all others together. latency: seconds of one message; a rank's go out one after another.

    peer_bandwidth: GB/s to one peer, where each has wires of its own. ranks: of one host. source: of these numbers.
    """
    name: str
    bandwidth: float
    latency: float
    source: str
    peer_bandwidth: float | None = None
    ranks: int = 8


def _pcie(name: str, transfers: float, lanes: int, source: str) -> Link:
    """transfers: 1e9 a second and lane, in frames of 130 bits for 128."""
    return Link(name, round(transfers * lanes * 128 / 130 / 8 * 0.9, 1), 2e-6, f"{source}, {_PAYLOAD}; {_LATENCY}")


LINKS = {link.name: link for link in (
    _pcie("pcie4x8", 16, 8, "PCI-SIG, PCIe 4.0: 16 GT/s a lane"),
    _pcie("pcie4x16", 16, 16, "PCI-SIG, PCIe 4.0: 16 GT/s a lane"),
    _pcie("pcie5x8", 32, 8, "PCI-SIG, PCIe 5.0: 32 GT/s a lane"),
    _pcie("pcie5x16", 32, 16, "PCI-SIG, PCIe 5.0: 32 GT/s a lane; measured between other cards: 54 of 63 GB/s (lukealonso/p2pmark)"),
    Link("xelink", 57.5, 2e-6, "ALCF user guide, Aurora: 23 GB/s both ways between two of six Max 1550, each linked to five others "
         "(15 GB/s one way); latency: assumed, as PCIe's", peer_bandwidth=11.5, ranks=6),
)}

# Beyond a host: of its network adapters, for each rank.
NETWORKS = {link.name: link for link in (
    Link("ib400", 43.0, 5e-6, "DeepEP V1, 16 ranks: 43 of 50 GB/s with a 400 Gb/s adapter for each GPU; latency: assumed"),
    Link("ib400-shared", 5.4, 5e-6, "the same with one adapter for a host's eight ranks, as aiconfigurator has B60's hosts"),
)}


def exchange_seconds(num_bytes: float, ranks: int, link: Link, network: Link) -> float:
    """Of an all-to-all in which each rank sends so many bytes to each other one.

    A host's ranks are linked; bytes to others pass a rank's own port as well, and then the network.
    """
    local = min(ranks, link.ranks) - 1
    remote = ranks - 1 - local
    return local * link.latency + remote * network.latency + num_bytes / 1e9 * max(
        (ranks - 1) / link.bandwidth, min(local, 1) / (link.peer_bandwidth or link.bandwidth), remote / network.bandwidth)
