"""A model's folder with its experts quantised: shard by shard, in layouts that other libraries read, too."""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..plan.formats import FORMATS
from .shards import INDEX, Shards, open_safetensors, shards_of
from .weight import QuantizedWeight

__all__ = ["WRITTEN", "quantize_folder"]

# by the names of the command's --format: the format of codes, and the usual --group
WRITTEN = {"int4": ("uint4", 128), "mxfp4": ("mxfp4", 32), "fp8": ("fp8_e4m3", 128)}

_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
_OF_ALL_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|up_proj|down_proj)$")
_KEY = "moe_xe"     # of a shard's metadata: what it was made with


def quantize_folder(source: Path, target: Path, format: str, group: int | None = None) -> Iterator[tuple[int, int]]:
    """Quantises the experts' weights of a dense model in `source`, one shard after the other, into `target`. Yields how many shards are
    there and how many there will be; what is there already, of the same model, format and group, is not made again.

    format, group: of WRITTEN; a group of int4 and mxfp4 is of so many columns, of fp8 a square block. Weights with a module for each expert
    become compressed-tensors' pack-quantized (int4) or mxfp4-pack-quantized (mxfp4), or FP8 blocks with weight_scale_inv; gpt-oss' mxfp4
    becomes gpt-oss' own; other tensors of all experts become moe_xe's own (docs/quantised-models.md). All else is copied. At most one shard
    is in memory.

    A file comes into place by one rename, config.json as the last. ValueError naming what is wrong, FileNotFoundError without a model.
    """
    if format not in WRITTEN:
        raise ValueError(f"format must be one of {', '.join(WRITTEN)}, got {format!r}")
    codes, usual = WRITTEN[format]
    group = usual if group is None else group
    if group < 1 or (FORMATS[codes].group is not None and group != usual):
        raise ValueError(f"group must be {usual if FORMATS[codes].group else 'positive'} for {format}, got {group}")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} must be a model's folder, it has no config.json")
    if target.resolve() == source.resolve():
        raise ValueError(f"the quantised model must have a folder of its own, got {target} twice")
    config = json.loads((source / "config.json").read_text())
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source} must be a dense model, its quant_method is {config['quantization_config'].get('quant_method')!r}")
    files = shards_of(source)
    names = [name for file in files for name in Shards([file])]
    if not any(map(_is_experts, names)):
        raise ValueError(f"{source} must have experts' weights (.experts.0.up_proj.weight or .experts.gate_up_proj), it has none")
    writer = _Writer(source, config, format, codes, (group, group) if format == "fp8" else (1, group))
    target.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for done, file in enumerate(files):
        yield done, len(files)
        settings = json.dumps({"format": format, "group": group, "source": [file.name, file.stat().st_size]})
        out = target / file.name
        if not out.is_file() or _metadata(out).get(_KEY) != settings:
            _save(out, writer.quantised(file), settings)
        weight_map.update(dict.fromkeys(Shards([out]), out.name))
        total += out.stat().st_size
    if (source / INDEX).is_file():
        _write(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in source.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf") and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, target / file.name)
    shards = Shards(target / name for name in {*weight_map.values()})
    _write(target / "config.json", config | {"quantization_config": writer.quantization_config(names, shards)})
    yield len(files), len(files)


class _Writer:
    """group: (gn, gk)."""

    def __init__(self, source: Path, config: dict, format: str, codes: str, group: tuple[int, int]):
        self._source, self._config, self._format, self._codes, self._group = source, config, format, codes, group
        self._is_gpt_oss = config.get("model_type") == "gpt_oss"
        self._transposed = None

    def quantised(self, file: Path) -> dict[str, torch.Tensor]:
        """A shard's tensors."""
        shards, tensors = Shards([file]), {}
        for name in shards:
            w = shards.read(name)
            tensors.update(self._tensors(name, w) if _is_experts(name) else {name: w})
        return tensors

    def _tensors(self, name: str, w: torch.Tensor) -> dict[str, torch.Tensor]:
        of_one = _OF_ONE_EXPERT.search(name) is not None
        transposed = not of_one and self.transposed
        logical = w[None] if of_one else w.mT.contiguous() if transposed else w
        k, columns = logical.shape[-1], self._group[1]
        if self._format != "fp8" and k % columns:
            raise ValueError(f"{name} must have a K that the group {columns} divides, got {k}")
        try:
            weight = QuantizedWeight.quantize(logical, self._codes, self._group, scale_dtype=w.dtype if self._format == "int4" else None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} cannot be quantised: {error}") from error
        codes, scales = weight.codes, weight.scales
        if of_one and self._format == "fp8":
            return {name: codes[0], f"{name}_scale_inv": scales[0]}
        if of_one and self._format == "mxfp4":
            return {f"{name}_packed": codes[0], f"{name}_scale": scales[0].view(torch.uint8)}
        if of_one:
            words = torch.nn.functional.pad(codes[0], (0, -codes.shape[2] % 4)).view(torch.int32)
            return {f"{name}_packed": words, f"{name}_scale": scales[0], f"{name}_shape": torch.tensor(w.shape)}
        if self._format == "mxfp4" and self._is_gpt_oss:
            return {f"{name}_blocks": codes.unflatten(2, (-1, 16)), f"{name}_scales": scales.view(torch.uint8)}
        return {f"{name}.codes": codes, f"{name}.scales": scales}

    @property
    def transposed(self) -> bool:
        """Whether a tensor of all experts is [E, K, N], which only the model's own code says."""
        if self._transposed is None:
            import transformers

            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(self._source))
            self._transposed = any(getattr(module, "is_transposed", False) for module in model.modules())
        return self._transposed

    def quantization_config(self, names: list[str], shards: Shards) -> dict:
        """names: of the dense model's tensors."""
        others = sorted({name.removesuffix(".weight") for name in names if name.endswith(".weight") and not _is_experts(name)})
        if not any(map(_OF_ONE_EXPERT.search, names)):
            if self._format == "mxfp4" and self._is_gpt_oss:
                return {"quant_method": "mxfp4", "modules_to_not_convert": others}
            return {"quant_method": "moe_xe", "weights": {name: self._description(name, shards) for name in names if _is_experts(name)}}
        if self._format == "fp8":
            return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(self._group),
                    "modules_to_not_convert": others}
        weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": self._group[1], "dynamic": False}
        format, weights = (("pack-quantized", weights | {"type": "int"}) if self._format == "int4" else
                           ("mxfp4-pack-quantized", weights | {"type": "float", "scale_dtype": "torch.uint8"}))
        return {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "ignore": others, "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": format}}}

    def _description(self, name: str, shards: Shards) -> dict:
        tensors = {part: shards.read(f"{name}.{part}", meta=True) for part in ("codes", "scales")}
        return QuantizedWeight(**tensors, format=self._codes, group=self._group, transposed=self.transposed).description()


def _is_experts(name: str) -> bool:
    return (_OF_ONE_EXPERT.search(name) or _OF_ALL_EXPERTS.search(name)) is not None


def _metadata(file: Path) -> dict:
    with open_safetensors(file) as opened:
        return opened.metadata() or {}


def _save(file: Path, tensors: dict[str, torch.Tensor], settings: str) -> None:
    from safetensors.torch import save_file

    unfinished = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata={"format": "pt", _KEY: settings})
    os.replace(unfinished, file)


def _write(file: Path, value: dict) -> None:
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, file)
