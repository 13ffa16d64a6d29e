"""Weights as ops take them: a dense tensor, or codes with scales."""
from __future__ import annotations

import torch

from ..plan.formats import Quantization
from ..plan.problem import INT8_MAX_K, WeightLayout
from ..quantized.weight import QuantizedWeight
from . import checks

__all__ = ["Weight", "check_int8_weight", "check_weight", "logical_weights", "quantization_of", "strides_of", "tensors_of"]

Weight = torch.Tensor | QuantizedWeight


def logical_weights(w: Weight, layout: str, name: str = "w") -> Weight:
    """The weights as [E, N, K]."""
    if layout not in ("enk", "ekn"):
        raise ValueError(f'weight_layout must be "enk" ([E, N, K]) or "ekn" ([E, K, N]), got {layout!r}')
    if not isinstance(w, QuantizedWeight):
        checks.check_tensor(name, w, 3, "[E, N, K]" if layout == "enk" else "[E, K, N]")
    return w if layout == "enk" else w.transpose(1, 2)


def check_weight(name: str, w: Weight, rows_name: str, rows: torch.Tensor) -> None:
    """TypeError or ValueError unless it can be multiplied with rows of this dtype, as far as types and strides say."""
    checks.check_weight_type(name, w)
    checks.check_dtype(rows_name, rows.dtype)
    if not isinstance(w, QuantizedWeight):
        checks.check_same_dtype(name, w, rows_name, rows)
        checks.weight_layout(name, w)
        return
    for part, tensor in tensors_of(name, w).items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{part} must not require a gradient, which codes have no use for: they are whole steps of a scale. Train an adapter "
                             f"(lora_moe) or dense weights")


def check_int8_weight(name: str, w: Weight, beside: str) -> None:
    """TypeError or ValueError unless its codes can be multiplied with int8 codes."""
    if not isinstance(w, QuantizedWeight):
        raise TypeError(f"{name} must be a QuantizedWeight in int8 beside {beside}, got {type(w).__name__}")
    if w.transposed or not w.quantization.scales_rows(w.shape[2]):
        zeros, order = " with zeros" * (w.zeros is not None), "[E, K, N]" if w.transposed else "[E, N, K]"
        raise ValueError(f"{name} must be int8 codes [E, N, K] without zeros, each row with one scale, beside {beside}; got {w.format} codes "
                         f"{order} in groups of {w.group}{zeros}")
    if w.shape[2] > INT8_MAX_K:
        raise ValueError(f"{name} must have at most K = {INT8_MAX_K} beside {beside}, got {list(w.shape)}")


def tensors_of(name: str, w: Weight) -> dict[str, torch.Tensor]:
    """What the weight consists of, by the names that users know."""
    if not isinstance(w, QuantizedWeight):
        return {name: w}
    return {f"{name}.{part}": tensor for part, tensor in w.tensors.items()}


def strides_of(name: str, w: Weight) -> tuple[WeightLayout, int, int]:
    """Layout in memory, row stride and expert stride, in weights, of logical [E, N, K] ones."""
    if not isinstance(w, QuantizedWeight):
        return checks.weight_layout(name, w)
    num_experts, n, k = w.shape
    layout, columns = (WeightLayout.ekn, n) if w.transposed else (WeightLayout.enk, k)
    return layout, columns, n * k if num_experts <= 1 else w.codes.stride(0) * 8 // w.quantization.codes.bits


def quantization_of(w: Weight) -> Quantization | None:
    """What kernels are compiled for."""
    return w.quantization if isinstance(w, QuantizedWeight) else None
