"""Tensors of safetensors files by name, read one by one."""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

__all__ = ["INDEX", "SINGLE", "Shards", "natural", "open_safetensors", "shards_of"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_safetensors(file: str | Path):
    """The open file. ImportError without safetensors, ValueError for what is no such file."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("safetensors is needed for checkpoints (pip install safetensors)") from error
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file, it cannot be read: {error}") from error


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder. FileNotFoundError without any, or where one that the index names is missing."""
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        files = [SINGLE]
    paths = [folder / file for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{folder} must have the file {path.name}, it has none")
    return paths


def natural(name: str) -> list:
    """A key for sorting names with numbers between dots: expert 2 comes before expert 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


class Shards:
    """The tensors of some files, which stay open. A name is of one file."""

    def __init__(self, files: Iterable[str | Path]):
        self._files = {}
        for file in files:
            opened = open_safetensors(file)
            self._files.update({name: opened for name in opened.keys()})

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def read(self, name: str, meta: bool = False) -> torch.Tensor:
        """meta: no values, on the device meta."""
        if not meta:
            return self._files[name].get_tensor(name)
        stored = self._files[name].get_slice(name)
        shape = stored.get_shape()
        dtype = (stored[:0] if shape else self.read(name)).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def stack(self, names: Sequence[str], meta: bool = False) -> torch.Tensor:
        """Tensors of one shape and dtype, with no more memory than their stack's and one's."""
        first = self.read(names[0], meta)
        stacked = first.new_empty((len(names), *first.shape))
        for i, name in enumerate([] if meta else names):
            tensor = self.read(name)
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise ValueError(f"{name} must be {first.dtype} {list(first.shape)} as {names[0]}, got {tensor.dtype} {list(tensor.shape)}")
            stacked[i] = tensor
        return stacked
