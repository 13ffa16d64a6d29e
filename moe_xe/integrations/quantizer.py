"""Transformers' quantiser of models whose experts' weights are `QuantizedWeight`s."""
from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn.gates import first_projection
from ..nn.quantized import QuantizedParameter, set_weight
from ..quantized.checks import check_numbers, has_numbers_only
from ..quantized.shards import Shards, natural
from ..quantized.stored import SIZES, find_stored, method_of
from ..quantized.weight import QuantizedWeight

__all__ = ["MoeXeConfig", "MoeXeQuantizer"]

_METHOD = "moe_xe"


@register_quantization_config(_METHOD)
class MoeXeConfig(QuantizationConfigMixin):
    """checkpoint: the quantization_config of a checkpoint of another method, to be loaded. weights: of one that moe_xe's models were saved as,
    by the weight's name: format, group, transposed, and dtype and shape of each tensor."""

    def __init__(self, checkpoint: dict | None = None, weights: dict[str, dict] | None = None, **_):
        self.quant_method, self.checkpoint, self.weights = _METHOD, checkpoint, weights or {}


class _Target:
    """A parameter of the model, and the names of the checkpoint's weights that it consists of: lists that are to be concatenated along N, of
    experts; or one weight."""

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name, self.parameter = module, name, getattr(module, name)
        self.by_pattern: dict[str | None, list[str]] = defaultdict(list)
        self.patterns: list[str | None] = [None]

    @property
    def is_experts(self) -> bool:
        return hasattr(self.module, "is_concatenated") and self.name in (first_projection(self.module), "down_proj")


@register_quantizer(_METHOD)
class MoeXeQuantizer(HfQuantizer):
    """Experts are read when all else is there, weight by weight. Other weights that are quantised in the checkpoint become dense."""

    requires_calibration = True
    _targets: dict[str, _Target] = {}

    def param_needs_quantization(self, model, param_name: str, **_) -> bool:
        """What is stored under a weight's own name may have another shape until it is read."""
        return param_name in self._targets

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        if self.quantization_config.checkpoint is None:
            self._put_saved(model)
            return
        self._shards = Shards(checkpoint_files)
        self._method = method_of(self.quantization_config.checkpoint)
        self._stored = find_stored(self._method, self._shards)
        self._targets = self._find_targets(model)
        if not self._targets:
            raise ValueError(f"the checkpoint must have weights {' and '.join(self._method.parts)}, as its quantization_config says, it has none "
                             f"of the model's")
        with torch.device("cpu"):       # sizes are read, though the model is being built on meta
            for full_name, target in self._targets.items():
                target.module._is_hf_initialized = True
                if target.is_experts:
                    set_weight(target.module, target.name, self._read(full_name, target, meta=True))
        # Missing and unexpected to Transformers, which allocates them where device_map says.
        names, endings = set(map(_anchored, self._targets)), map(re.escape, filter(None, self._method.parts.values()))
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *names}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *names,
                                                    rf"({'|'.join(endings)}|(activation|input|output)(_global)?_scale)$"}

    def _process_model_after_weight_loading(self, model, **_):
        if self.quantization_config.checkpoint is None:
            for module in model.modules():
                if isinstance(module, QuantizedParameter) and module.device.type != "meta":
                    module.finite = has_numbers_only(module.weight)
        else:
            for full_name, target in logging.tqdm(self._targets.items(), desc="Loading quantised weights"):
                self._fill(full_name, target)
            experts = [full_name for full_name, target in self._targets.items() if target.is_experts]
            model._weight_conversions = [conversion for conversion in getattr(model, "_weight_conversions", None) or []
                                         if not (hasattr(conversion, "operations") and _makes(conversion, experts))]
            del self._shards, self._stored, self._targets
        model.config.quantization_config = self.quantization_config = MoeXeConfig(weights={
            name: module.weight.description() for name, module in model.named_modules() if isinstance(module, QuantizedParameter)})
        return model

    def _find_targets(self, model) -> dict[str, _Target]:
        # The ways of Transformers' own loading: a version that has others must not stop `register`.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        conversions, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        targets = {}
        for stored in sorted(self._stored, key=natural):
            full_name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            if full_name not in state:      # of a part that the model has not, such as multi-token prediction
                continue
            if full_name not in targets:
                owner, _, name = full_name.rpartition(".")
                targets[full_name] = _Target(model.get_submodule(owner), name)
                if pattern is not None:
                    _check_operations(full_name, by_pattern[pattern])
                    targets[full_name].patterns = by_pattern[pattern].source_patterns
                _check_target(full_name, targets[full_name], pattern)
            targets[full_name].by_pattern[pattern].append(stored)
        return _in_order(targets, model)

    def _read(self, full_name: str, target: _Target, meta: bool = False) -> QuantizedWeight:
        """A weight of experts; meta: without values."""
        pieces = []
        for pattern in target.patterns:
            names = target.by_pattern[pattern]
            if not names:
                raise ValueError(f"{full_name} needs {pattern} too, the checkpoint has none that is quantised")
            if pattern is None:
                parts = {part: self._shards.read(key, meta and part not in SIZES) for part, key in self._stored[names[0]].items()}
            else:
                parts = {part: self._shards.stack([self._key(name, part) for name in names], meta and part not in SIZES)
                         for part in self._stored[names[0]]}
            pieces.append(self._convert(names[0], parts))
        weight = pieces[0] if len(pieces) == 1 else QuantizedWeight.cat(pieces, dim=1)
        return weight.mT if target.module.is_transposed else weight

    def _key(self, name: str, part: str) -> str:
        if part not in self._stored[name]:
            raise ValueError(f"{name} must have {part} in the checkpoint, as other experts have")
        return self._stored[name][part]

    def _convert(self, name: str, parts: dict[str, torch.Tensor]) -> QuantizedWeight:
        try:
            weight = self._method.convert(parts, self.quantization_config.checkpoint)
            if weight.device.type == "meta":
                return weight
            check_numbers(weight)
            return replace(weight, finite=True).prepacked()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} cannot be loaded: {error}") from error

    def _fill(self, full_name: str, target: _Target) -> None:
        module, name = target.module, target.name
        device = getattr(module, name).device
        if device.type == "meta":
            raise ValueError(f"device_map must keep quantised weights on a device, got none for {full_name}")
        if target.is_experts:
            set_weight(module, name, self._read(full_name, target).to(device))
            return
        (stored,) = target.by_pattern[None]
        parts = {part: self._shards.read(key)[None] for part, key in self._stored[stored].items()}
        dense = self._convert(stored, parts).dequantize(target.parameter.dtype)[0]
        setattr(module, name, nn.Parameter(dense.to(device), requires_grad=target.parameter.requires_grad))

    def _put_saved(self, model) -> None:
        for full_name, description in _in_order(self.quantization_config.weights, model).items():
            owner, _, name = full_name.rpartition(".")
            module = model.get_submodule(owner)
            set_weight(module, name, QuantizedWeight.of_description(description, "meta"))
            module._is_hf_initialized = True

    def is_serializable(self, **_) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True     # what is not quantised, and adapters

    @property
    def is_compileable(self) -> bool:
        return True


def _in_order(by_name: dict, model) -> dict:
    """As the model has its parameters: adapters go by their order."""
    return {name: by_name[name] for name in model.state_dict() if name in by_name}


def _anchored(name: str) -> str:
    """A pattern of a weight's name, and of its tensors'."""
    return rf"^{re.escape(name)}(\.\w+)?$"


def _check_target(full_name: str, target: _Target, pattern: str | None) -> None:
    if not target.is_experts and (pattern is not None or target.parameter.dim() != 2):
        raise ValueError(f"{full_name} must be a linear layer's weight, or one of experts that Transformers lets be chosen, for a quantised one "
                         f"to be loaded, it is one of {type(target.module).__name__}")


def _check_operations(full_name: str, converter) -> None:
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or len(converter.target_patterns) != 1:
        raise ValueError(f"{full_name} must be experts' weights, stacked and concatenated, for quantised ones to be loaded; Transformers makes "
                         f"it by {converter.operations}")


def _makes(converter, names: list[str]) -> bool:
    return any(re.search(f"{target.replace('*', '.*')}$", name) for target in converter.target_patterns for name in names)
