"""moe_xe: Mixture-of-Experts GEMMs for Intel Xe GPUs and, on the SYCL CPU device, for any x86 machine."""
import importlib as _importlib

from .device import devices, on_queue
from .grouped_gemm import interface as _interface, reference as _reference    # before the function takes the package's name
from .ops.block.fused_moe import Fusions, SharedExpert, fused_moe, fused_moe_workspace_bytes
from .ops.gemm.grouped_gemm import explain, grouped_gemm
from .ops.gemm import gradient as _gemm_gradient    # register themselves
from .ops.routing import gradient as _route_gradient
from .ops.gemm.grouped_mm import grouped_mm
from .ops.gemm.grouped_outer import grouped_outer
from .ops.gemm.scaled_grouped_mm import scaled_grouped_mm
from .ops.lora.lora_moe import LoraAdapter, lora_moe
from .ops.routing.route import route
from .ops.routing.token_sort import combine, sort_tokens
from .plan.choice.block_config import GemmConfigs, MoeConfig
from .plan.gemm.config import CpuConfig, GenericConfig, Schedule, XeConfig
from .plan.outer.config import OuterCpuConfig, OuterGenericConfig, OuterXeConfig
from .quantized import QuantizedWeight

# `import moe_xe.grouped_gemm.interface as i` looks the submodule up on whatever moe_xe.grouped_gemm is
grouped_gemm.interface, grouped_gemm.reference = _interface, _reference

__version__ = "0.1.0"
__all__ = ["CpuConfig", "Fusions", "GemmConfigs", "GenericConfig", "LoraAdapter", "MoeConfig", "OuterCpuConfig", "OuterGenericConfig",
           "OuterXeConfig", "QuantizedWeight", "Schedule", "SharedExpert", "XeConfig", "combine", "devices", "explain", "fused_moe",
           "fused_moe_workspace_bytes", "grouped_gemm", "grouped_mm", "grouped_outer", "lora_moe", "on_queue", "route",
           "scaled_grouped_mm", "sort_tokens"]
_LAZY = ("distributed", "integrations", "nn")      # submodules that are imported when they are asked for


def __getattr__(name: str):
    if name in _LAZY:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
