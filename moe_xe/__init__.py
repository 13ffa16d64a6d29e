"""moe_xe: Mixture-of-Experts GEMMs for Intel Xe GPUs and, on the SYCL CPU device, for any x86 machine."""
from .device import devices, on_queue
from .ops.fused_moe import Fusions, SharedExpert, fused_moe
from .ops.grouped_gemm import explain, grouped_gemm
from .ops.grouped_mm import grouped_mm

__version__ = "0.1.0"
__all__ = ["Fusions", "SharedExpert", "devices", "explain", "fused_moe", "grouped_gemm", "grouped_mm", "on_queue"]
