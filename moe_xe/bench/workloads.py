"""Shapes of published models and the rows per expert that they produce."""
from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch


@dataclass(frozen=True)
class Model:
    """The MoE part of a model: its public configuration's numbers."""
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def gemms(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(N, K) of the gate-and-up projection and of the down projection."""
        return (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)


MODELS = {model.name: model for model in (
    Model("gpt-oss-20b", 2880, 2880, 32, 4),
    Model("qwen3-30b-a3b", 2048, 768, 128, 8),
    Model("mixtral-8x7b", 4096, 14336, 8, 2),
    Model("deepseek-v3", 7168, 2048, 256, 8),
)}


def recorded_layers() -> list[list[int]]:
    """Rows per expert of gpt-oss-20b, 24 layers x 32 experts, recorded in a real prefill."""
    return json.loads(files(__package__).joinpath("data/gpt_oss_20b_tokens_per_expert.json").read_text())["layers"]


def load_layers(path: Path) -> list[list[int]]:
    """Rows per expert from a JSON file: a list of layers, one such layer, or an object whose "layers" is that list.

    Raises ValueError naming the file for anything else.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    layers = data.get("layers") if isinstance(data, dict) else data
    if isinstance(layers, list) and layers and all(isinstance(rows, int) for rows in layers):
        layers = [layers]
    valid = isinstance(layers, list) and layers and all(
        isinstance(layer, list) and layer and all(isinstance(rows, int) and not isinstance(rows, bool) and rows >= 0 for rows in layer)
        for layer in layers)
    if not valid:
        raise ValueError(f"{path}: expected layers as lists of non-negative row counts, one for each expert")
    return layers


def routed_rows(model: Model, tokens: int, generator: torch.Generator) -> list[int]:
    """Rows per expert when every token picks its top-k of the experts at random (uniform, without repetition)."""
    picked = torch.rand(tokens, model.num_experts, generator=generator).topk(model.top_k, dim=1).indices
    return torch.bincount(picked.flatten(), minlength=model.num_experts).tolist()
