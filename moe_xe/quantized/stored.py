"""Under which names checkpoints keep the tensors of one quantised weight, and what `QuantizedWeight` they are."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .weight import QuantizedWeight

__all__ = ["METHODS", "SIZES", "Method", "find_stored", "method_of"]

SIZES = {"weight_shape"}        # parts whose values are sizes of others


@dataclass(frozen=True)
class Method:
    """Of a quantization_config. parts: behind which ending of the weight's name each tensor is, by the converter's argument. The first one is there for every
    quantised weight. Endings begin behind "name" or, if the weight's own name ends in it, before `own`.
    convert: tensors by part, with a leading dimension of experts, and the configuration -> QuantizedWeight.
    """
    parts: dict[str, str]
    convert: Callable[[dict[str, torch.Tensor], dict], QuantizedWeight]
    own: str = ""


def _from_gptq(parts, config):
    zeros = parts.setdefault("qzeros", None)        # mixed precision: each weight's own size says its bits
    bits = config.get("bits", 4) if zeros is None else 32 * zeros.shape[-1] // parts["scales"].shape[-1]
    return QuantizedWeight.from_gptq(**parts, bits=bits, version=2 if config.get("checkpoint_format") == "gptq_v2" else 1)


def _from_awq(parts, config):
    return QuantizedWeight.from_awq(parts["qweight"], parts.get("qzeros"), parts["scales"])


def _from_fp8(parts, config):
    weight, scales = parts["weight"], parts["weight_scale_inv"]
    if weight.dtype in (torch.int8, torch.uint8):       # DeepSeek-V4's experts
        return QuantizedWeight(weight.view(torch.uint8), scales, format="mxfp4")
    block = config.get("weight_block_size")
    return QuantizedWeight.from_fp8_block(weight, scales, tuple(block)) if block else QuantizedWeight.from_fp8(weight, scales)


def _from_modelopt(parts, config):
    return QuantizedWeight.from_modelopt(**parts) if "weight_scale_2" in parts else QuantizedWeight.from_fp8(parts["weight"], parts["weight_scale"])


_GPTQ_PARTS = {part: f".{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
_COMPRESSED_PARTS = {"weight_scale": "_scale", "weight": "", "weight_packed": "_packed", "weight_shape": "_shape",
                     "weight_zero_point": "_zero_point", "weight_global_scale": "_global_scale", "weight_g_idx": "_g_idx"}
METHODS = {
    "mxfp4": Method({"blocks": "_blocks", "scales": "_scales"}, lambda parts, config: QuantizedWeight.from_gpt_oss(**parts)),
    "fp8": Method({"weight_scale_inv": "_scale_inv", "weight": ""}, _from_fp8),
    "gptq": Method(_GPTQ_PARTS, _from_gptq, ".weight"),
    "awq": Method(_GPTQ_PARTS, _from_awq, ".weight"),
    "compressed-tensors": Method(_COMPRESSED_PARTS, lambda parts, config: QuantizedWeight.from_compressed_tensors(**parts)),
    "modelopt": Method({"weight_scale": "_scale", "weight": "", "weight_scale_2": "_scale_2"}, _from_modelopt),
}
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def method_of(config: dict) -> Method:
    """Of a checkpoint's quantization_config. ValueError for one that is not supported."""
    name = config.get("quant_method")
    if name == "auto-round":
        packing = config.get("packing_format", "auto_round:auto_gptq")
        name = _AUTO_ROUND.get(packing)
        if name is None:
            raise ValueError(f"quantization_config's packing_format must be one of {', '.join(_AUTO_ROUND)}, got {packing!r}")
    if name not in METHODS:
        raise ValueError(f"quantization_config's quant_method must be one of {', '.join([*METHODS, 'auto-round'])}, got {name!r}")
    if name == "awq" and (layout := str(config.get("version") or config.get("format") or "gemm").lower()) != "gemm":
        raise ValueError(f'quantization_config\'s version must be "gemm" for awq, got {layout!r}')
    return METHODS[name]


def find_stored(method: Method, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names of the tensors of each quantised weight, by its own name and by part."""
    names, found = set(names), {}
    marker = next(iter(method.parts.values()))
    for name in names:
        if name.endswith(marker):
            start = name.removesuffix(marker)
            parts = {part: start + ending for part, ending in method.parts.items() if start + ending in names}
            if len(parts) > 1:
                found[start + method.own] = parts
    return found
