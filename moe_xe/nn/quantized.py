"""Quantised weights as parts of modules."""
from __future__ import annotations

import torch
from torch import nn

from ..ops.weights import Weight
from ..quantized.weight import QuantizedWeight

__all__ = ["QuantizedParameter", "check_takes_place", "set_weight", "weight_of"]


class QuantizedParameter(nn.Module):
    """A `QuantizedWeight` where a module has a parameter: its tensors are buffers, codes, scales, zeros and global_scales, and so in state
    dicts. They move with the module, but keep their dtypes, whatever it is cast to. Format and group are the module's own and in no state dict:
    one of other dtypes or shapes is refused, but equal bytes of another format are not told apart."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weight must be a QuantizedWeight, got {type(weight).__name__}")
        for name in weight.PARTS:
            self.register_buffer(name, getattr(weight, name))
        self.format, self.group, self.transposed, self.finite = weight.format, weight.group, weight.transposed, weight.finite

    @property
    def weight(self) -> QuantizedWeight:
        return QuantizedWeight(self.codes, self.scales, self.zeros, self.global_scales, self.format, self.group, self.transposed,
                               self.finite)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _apply(self, fn, recurse: bool = True):
        def moved(tensor):
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        for name, own in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if given is not None and given.dtype != own.dtype:      # which torch would cast, codes as if they were numbers
                error_msgs.append(f"{prefix}{name} must be {own.dtype} for {self.weight}, got {given.dtype}")
        if prefix + "codes" in state_dict:
            self.finite = False
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        return repr(self.weight)


def weight_of(module: nn.Module, name: str) -> Weight:
    """A module's weight: its parameter, or quantised."""
    value = getattr(module, name)
    if isinstance(value, QuantizedParameter):
        return value.weight
    scales = getattr(module, f"{name}_scale_inv", None)
    return value if scales is None or value.element_size() > 1 else _weight_of_fp8_experts(module, value, scales)


def _weight_of_fp8_experts(module: nn.Module, codes: torch.Tensor, scales: torch.Tensor) -> QuantizedWeight:
    """A weight of Transformers' FP8Experts, in place: FP8 with scales of blocks, or of a tensor, or FP4 with MXFP4's. They are frozen there,
    too."""
    codes, scales = codes.detach(), scales.detach()
    if codes.dtype == torch.int8:
        return QuantizedWeight(codes.view(torch.uint8), scales, format="mxfp4", group=(1, 32))
    n, (rows, columns) = codes.shape[1], module.block_size or codes.shape[1:]
    if scales.shape[1] == 2:      # gate and up have one each, however few rows they have
        rows = -(-n // 2)
    return QuantizedWeight(codes, scales, format="fp8_e4m3", group=(rows, columns))


def check_takes_place(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """TypeError or ValueError unless it can stand in the place of what the module has under this name."""
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{name} must be a QuantizedWeight, got {type(weight).__name__}")
    shape = getattr(module, name).shape
    if weight.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {weight}")


def set_weight(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts a quantised weight in the place of a module's parameter, or of another quantised weight, of its shape."""
    check_takes_place(module, name, weight)
    delattr(module, name)
    module.register_module(name, QuantizedParameter(weight))
