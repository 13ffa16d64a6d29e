"""What a device can do at best: the records behind every roofline and behind the cost model.

Peaks are Intel's published dense rates; a float32 rate is for the vector engines (exact float32), tf32 for dpas.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..problem import Dtype


@dataclass(frozen=True)
class XeArchitecture:
    """What the Xe cores of one generation share; sources: where each number is from.

    engines: vector engines of a core, each with a matrix engine. dpas_cycles: of one dpas of 8 rows x 16 lanes and 32 bytes
    of K, in any type. l1_bytes: of a core, shared with SLM. l1_rate: bytes a clock from there to a core's registers. l2_rate:
    bytes a clock from L2 to one core. load_latency: clocks of a load that hits L1. memory_latency: seconds of one that
    misses L2, memory being idle. counted: ocloc's target whose instruction counts stand for this generation.
    """
    engines: int
    dpas_cycles: int
    l1_bytes: int
    l1_rate: int
    l2_rate: int
    load_latency: int
    memory_latency: float
    counted: str
    sources: dict[str, str] = field(hash=False)


@dataclass(frozen=True)
class DeviceRecord:
    """tflops: peak per input type (and "tf32"), 1e12 operations a second. bandwidth: GB/s. source: of these numbers.

    architecture, clock (GHz) and l2_bytes: of an Xe GPU; sources: of the latter two. codename: what else it is known by. link: to
    other cards, of `links.LINKS`, "" for none.
    """
    name: str
    xe_cores: int
    tflops: dict[str, float] = field(hash=False)
    bandwidth: float
    source: str
    architecture: XeArchitecture | None = None
    clock: float = 0.0
    l2_bytes: int = 0
    sources: dict[str, str] = field(default_factory=dict, hash=False)
    codename: str = ""
    link: str = ""

    def peak(self, dtype: Dtype, tf32: bool = False) -> float:
        """Operations a second at best."""
        return self.tflops["tf32" if dtype is Dtype.f32 and tf32 and "tf32" in self.tflops else dtype.value] * 1e12

    def roofline_seconds(self, flops: float, num_bytes: float, dtype: Dtype, tf32: bool = False) -> float:
        """The least time for this many operations and bytes moved once."""
        return max(flops / self.peak(dtype, tf32), num_bytes / (self.bandwidth * 1e9))


_ASSUMED = "assumed: no published figure"
XE2 = XeArchitecture(
    engines=8, dpas_cycles=16, l1_bytes=256 << 10, l1_rate=256, l2_rate=64, load_latency=100, memory_latency=0.5e-6,
    counted="bmg",
    sources={"engines": "Intel, Xe2: 8 vector and 8 matrix engines a core",
             "dpas_cycles": "Intel, Xe2: 2048 16-bit operations a clock and core",
             "l1_bytes": "Intel, Xe2: 256 KB of L1 and SLM", "l1_rate": f"{_ASSUMED}; half of Xe-HPC's, as the matrix rate is",
             "l2_rate": f"{_ASSUMED}; one line a clock", "load_latency": _ASSUMED, "memory_latency": _ASSUMED})
XE3 = XE2      # Panther Lake: the same engines a core; ocloc counts the same instructions
XE_HPC = XeArchitecture(
    engines=8, dpas_cycles=8, l1_bytes=512 << 10, l1_rate=512, l2_rate=64, load_latency=100, memory_latency=0.5e-6,
    counted="pvc",
    sources={"engines": "Intel, Hot Chips 33: 8 vector and 8 matrix engines a core",
             "dpas_cycles": "Intel, Hot Chips 33: 4096 16-bit operations a clock and core",
             "l1_bytes": "Intel, Hot Chips 33: 512 KB of L1 and SLM", "l1_rate": "Intel, Hot Chips 33: 512 bytes a clock",
             "l2_rate": f"{_ASSUMED}; one line a clock", "load_latency": _ASSUMED, "memory_latency": _ASSUMED})

_CLOCK = "published int8 rate / (cores x operations a clock)"


def _xe(name: str, xe_cores: int, int8_tops: float, f32_tflops: float, bandwidth: float, source: str,
        architecture: XeArchitecture, l2_megabytes: int, l2_source: str, codename: str, link: str = "") -> DeviceRecord:
    """dpas does half as many 16-bit operations as int8 ones, and a quarter in tf32."""
    int8_operations = 2 * 2 * 8 * 16 * 16 * architecture.engines // architecture.dpas_cycles     # of a core and clock
    tflops = {"i8": int8_tops, "bf16": int8_tops / 2, "f16": int8_tops / 2, "tf32": int8_tops / 4, "f32": f32_tflops}
    return DeviceRecord(name, xe_cores, tflops, bandwidth, source, architecture, int8_tops * 1e3 / (xe_cores * int8_operations),
                        l2_megabytes << 20, {"clock": _CLOCK, "l2_bytes": l2_source}, codename, link)


RECORDS = (
    _xe("Arc B580", 20, 233, 14.6, 456, "Intel ARK: Arc B580 (233 INT8 TOPS, 456 GB/s)", XE2, 18,
        "Chips and Cheese, Battlemage: 18 MB", "Battlemage G21", "pcie4x8"),
    _xe("Arc B570", 18, 203, 12.6, 380, "Intel ARK: Arc B570 (203 INT8 TOPS, 380 GB/s)", XE2, 15,
        "inferred: 3 MB for each 32 bits of bus, as B580", "Battlemage G21", "pcie4x8"),
    _xe("Arc Pro B60", 20, 197, 12.3, 456, "Intel ARK: Arc Pro B60 (197 INT8 TOPS, 456 GB/s)", XE2, 18,
        "the same chip as B580", "Battlemage G21", "pcie5x8"),
    _xe("Arc Pro B70", 32, 367, 22.9, 608, "Intel: Arc Pro B70 (367 INT8 TOPS, 608 GB/s)", XE2, 24,
        "inferred: 3 MB for each 32 bits of bus, as B580", "Battlemage G31", "pcie5x16"),
    _xe("Data Center GPU Max 1550", 128, 1664, 52.4, 3276.8, "Intel: Max 1550 (832 bf16 TFLOP/s, 3276.8 GB/s)", XE_HPC, 408,
        "Intel: 408 MB, both stacks", "Ponte Vecchio", "xelink"),
    _xe("Data Center GPU Max 1100", 56, 704, 22.2, 1228.8, "Intel: Max 1100 (352 bf16 TFLOP/s, 1228.8 GB/s)", XE_HPC, 108,
        "Chips and Cheese, Ponte Vecchio: 108 MB", "Ponte Vecchio", "pcie5x16"),
    _xe("Arc 140V", 8, 67, 4.0, 136.5, "Intel ARK: Core Ultra 200V graphics (67 INT8 TOPS, LPDDR5X-8533)", XE2, 8,
        "Intel, Lunar Lake: 8 MB", "Lunar Lake"),
    _xe("Arc B390", 12, 120, 7.4, 153.6, "Intel: Panther Lake 12 Xe3 graphics (120 INT8 TOPS, LPDDR5X-9600)", XE3, 16,
        "Intel, Panther Lake: 16 MB", "Panther Lake"),
)


def record_named(text: str) -> DeviceRecord:
    """The one record whose name or codename contains the text, be it "b60" or "lunar-lake". ValueError for none or several."""
    def plain(name: str) -> str:
        return "".join(filter(str.isalnum, name.lower()))

    found = [record for record in RECORDS if plain(text) in plain(record.name) or plain(text) in plain(record.codename)]
    if len(found) != 1 or not plain(text):
        names = ", ".join(record.name for record in found or RECORDS)
        raise ValueError(f"device must be part of one of these names: {names}; got {text!r}")
    return found[0]


def find_record(device_name: str) -> DeviceRecord | None:
    """The record of a device by the name that its driver reports; None for an unknown one."""
    plain = device_name.replace("(R)", "").replace("(TM)", "").lower()
    return next((record for record in RECORDS if record.name.lower() in " ".join(plain.split())), None)


def record_of(name: str, xe_cores: int) -> DeviceRecord:
    """The record of an Xe GPU with wide dpas, by the name and the number of Xe cores that its driver reports.

    A stand-in where there is none: an unknown GPU is taken for an Arc B580, a known one with another number of cores (one
    stack of a Max 1550, say) for its record; peaks, bandwidth and L2 are scaled by the cores.
    """
    record = find_record(name)
    if record is not None and record.xe_cores == xe_cores:
        return record
    base = record or find_record("Arc B580")
    share = xe_cores / base.xe_cores
    return replace(base, name=name, xe_cores=xe_cores, tflops={dtype: rate * share for dtype, rate in base.tflops.items()},
                   bandwidth=base.bandwidth * share, l2_bytes=round(base.l2_bytes * share), codename="",
                   source=f"a stand-in: {base.name} with {xe_cores} cores")
