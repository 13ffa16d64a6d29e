"""Tensors of several safetensors files."""
from __future__ import annotations

import json

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")

from moe_xe.quantized.shards import INDEX, Shards, natural, shards_of  # noqa: E402


def test_reading(tmp_path):
    tensors = {f"experts.{e}.weight": torch.randn(3, 5).to(torch.float8_e4m3fn) for e in range(11)} | {"scale": torch.tensor(2.0)}
    names = sorted(tensors)
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for i, file in enumerate(files):
        safetensors.save_file({name: tensors[name] for name in names[i::2]}, file)
    shards = Shards(files)
    assert set(shards) == set(names) and "scale" in shards and "scales" not in shards
    experts = sorted((name for name in shards if name != "scale"), key=natural)
    assert experts == [f"experts.{e}.weight" for e in range(11)]
    stacked = shards.stack(experts)
    assert stacked.dtype == torch.float8_e4m3fn and torch.equal(stacked.float(), torch.stack([tensors[name].float() for name in experts]))
    meta = shards.stack(experts, meta=True)
    assert meta.is_meta and (meta.shape, meta.dtype) == (stacked.shape, stacked.dtype)
    assert shards.read("scale") == 2 and shards.read("scale", meta=True).shape == ()
    with pytest.raises(ValueError, match=r"scale must be torch.float8_e4m3fn \[3, 5\] as experts.0.weight, got torch.float32 \[\]"):
        shards.stack([experts[0], "scale"])


def test_files_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="must have the file model.safetensors, it has none"):
        shards_of(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert shards_of(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "1.safetensors"}}))
    (tmp_path / "1.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="must have the file 2.safetensors, it has none"):
        shards_of(tmp_path)
    (tmp_path / "2.safetensors").touch()
    assert shards_of(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
