"""What a device can do at best: the records behind every roofline.

Peaks are Intel's published dense rates; a float32 rate is for the vector engines (exact float32), tf32 for dpas.
"""
from __future__ import annotations

from dataclasses import dataclass

from .problem import Dtype


@dataclass(frozen=True)
class DeviceRecord:
    """tflops: peak per input type (and "tf32"), 1e12 operations a second. bandwidth: GB/s. source: of the numbers."""
    name: str
    xe_cores: int
    tflops: dict[str, float]
    bandwidth: float
    source: str

    def roofline_seconds(self, flops: float, num_bytes: float, dtype: Dtype, tf32: bool = False) -> float:
        """The least time for this many operations and bytes moved once."""
        peak = self.tflops["tf32" if dtype is Dtype.f32 and tf32 and "tf32" in self.tflops else dtype.value]
        return max(flops / (peak * 1e12), num_bytes / (self.bandwidth * 1e9))


def _xe(name: str, xe_cores: int, int8_tops: float, f32_tflops: float, bandwidth: float, source: str) -> DeviceRecord:
    """dpas does half as many 16-bit operations as int8 ones, and a quarter in tf32."""
    return DeviceRecord(name, xe_cores, {"bf16": int8_tops / 2, "f16": int8_tops / 2, "tf32": int8_tops / 4, "f32": f32_tflops},
                        bandwidth, source)


RECORDS = (
    _xe("Arc B580", 20, 233, 14.6, 456, "Intel ARK: Arc B580 (233 INT8 TOPS, 456 GB/s)"),
    _xe("Arc B570", 18, 203, 12.6, 380, "Intel ARK: Arc B570 (203 INT8 TOPS, 380 GB/s)"),
    _xe("Arc Pro B60", 20, 197, 12.3, 456, "Intel ARK: Arc Pro B60 (197 INT8 TOPS, 456 GB/s)"),
    _xe("Arc Pro B70", 32, 367, 22.9, 608, "Intel: Arc Pro B70 (367 INT8 TOPS, 608 GB/s)"),
    _xe("Data Center GPU Max 1550", 128, 1664, 52.4, 3276.8, "Intel: Max 1550 (832 bf16 TFLOP/s, 3276.8 GB/s)"),
    _xe("Data Center GPU Max 1100", 56, 704, 22.2, 1228.8, "Intel: Max 1100 (352 bf16 TFLOP/s, 1228.8 GB/s)"),
    _xe("Arc 140V", 8, 67, 4.0, 136.5, "Intel ARK: Core Ultra 200V graphics (67 INT8 TOPS, LPDDR5X-8533)"),
    _xe("Arc B390", 12, 120, 7.4, 153.6, "Intel: Panther Lake 12 Xe3 graphics (120 INT8 TOPS, LPDDR5X-9600)"),
)


def find_record(device_name: str) -> DeviceRecord | None:
    """The record of a device by the name that its driver reports; None for an unknown one."""
    plain = device_name.replace("(R)", "").replace("(TM)", "").lower()
    return next((record for record in RECORDS if record.name.lower() in " ".join(plain.split())), None)
