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
    """Of a quantization_config.

    parts: by the converter's argument, the ending of a tensor's name, in the place of `own` at the end of the weight's. The first one is
    there for every quantised weight, and for no other.
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
    block = config.get("weight_block_size")
    if block is None:
        return QuantizedWeight.from_fp8(parts["weight"], parts["weight_scale_inv"])
    return QuantizedWeight.from_fp8_block(**parts, block=tuple(block))


def _from_compressed(parts, config):
    weights = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    blocks = {tuple(block) for scheme in weights if (block := scheme.get("block_structure"))}
    return QuantizedWeight.from_compressed_tensors(**parts, **{"block": block for block in blocks})


def _from_modelopt(parts, config):
    if "weight_scale_2" in parts:
        return QuantizedWeight.from_modelopt(**parts)
    return QuantizedWeight.from_fp8(parts["weight"], parts["weight_scale"])


_GPTQ_PARTS = {part: f".{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
_COMPRESSED_PARTS = {"weight_scale": "_scale", "weight": "", "weight_packed": "_packed", "weight_shape": "_shape",
                     "weight_zero_point": "_zero_point", "weight_global_scale": "_global_scale", "weight_g_idx": "_g_idx"}
METHODS = {
    "mxfp4": Method({"blocks": "_blocks", "scales": "_scales"}, lambda parts, config: QuantizedWeight.from_gpt_oss(**parts)),
    "fp8": Method({"weight_scale_inv": "_scale_inv", "weight": ""}, _from_fp8),
    "gptq": Method(_GPTQ_PARTS, _from_gptq, ".weight"),
    "awq": Method(_GPTQ_PARTS, _from_awq, ".weight"),
    "compressed-tensors": Method(_COMPRESSED_PARTS, _from_compressed),
    "modelopt": Method({"weight_scale": "_scale", "weight": "", "weight_scale_2": "_scale_2"}, _from_modelopt),
}
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def _check(config: dict, name: str, value, *possible) -> None:
    if value not in possible:
        raise ValueError(f"quantization_config's {name} must be {' or '.join(map(repr, possible))} for {config['quant_method']}, got {value!r}")


def _check_gptq(config):
    _check(config, "checkpoint_format", config.get("checkpoint_format") or "gptq", "gptq", "gptq_v2")


def _check_awq(config):
    _check(config, "version", str(config.get("version") or config.get("format") or "gemm").lower(), "gemm")
    _check(config, "bits", config.get("bits", 4), 4)


def _check_compressed(config):
    """Weights that are rotated, or left out where they are zero, are no weights of ours."""
    groups = (config.get("config_groups") or {}).values()
    for format in {config.get("format"), *(group.get("format") for group in groups)} - {None, "dense", "mixed-precision"}:
        _check(config, "format", format, *_COMPRESSED_FORMATS)
    _check(config, "sparsity_config's format", (config.get("sparsity_config") or {}).get("format", "dense"), "dense")
    _check(config, "transform_config", config.get("transform_config") or None, None)


_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
_CHECKS = {"gptq": _check_gptq, "awq": _check_awq, "compressed-tensors": _check_compressed}


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
    _CHECKS.get(name, lambda config: None)(config)
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
