"""Trains adapters on the quantised experts of a small Qwen3-MoE (QLoRA), and beside it the same adapters on dense experts.

    python examples/train_quantised_lora.py --format int4

The base learns Python's documentation, byte by byte, and is saved, quantised and loaded again as a checkpoint would be. The adapters learn
Python source, three times from the same start on the same batches: on the quantised experts; on the dense ones that these are, where only
roundings differ; and on those they were quantised from. The exit status is 1 if a loss is further from the quantised experts' than its
limit.
"""
import argparse
import inspect
import json as jsonlib
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from train_tiny_moe import FIRST_STEPS, FIRST_TOLERANCE, TOLERANCE, make_model, read_text

from moe_xe.bench.memory import peak_bytes
from moe_xe.cli.tables import new_table, print_table
from moe_xe.nn import LoraExperts
from moe_xe.quantized.folder import quantize_folder

BASE_RATE, ADAPTERS_RATE = 2e-3, 5e-3
# Between a step's losses on the quantised experts and on those they were quantised from. About three times what is seen.
DENSE_LIMIT = {"fp8": 0.025, "int4": 0.05, "mxfp4": 0.07}


def read_source() -> torch.Tensor:
    """[about 100 000] bytes, as int64."""
    return torch.tensor(list(inspect.getsource(argparse).encode()))


def train(model: torch.nn.Module, text: torch.Tensor, steps: int, rate: float, options: dict) -> list[float]:
    """The loss of each step. Batches are the seed's."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.01)
    generator, places = torch.Generator().manual_seed(options["seed"]), torch.arange(options["seqlen"])
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - options["seqlen"], (options["batch"], 1), generator=generator)
        losses.append(backward(model, text[starts + places]))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def backward(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    tokens = tokens.to(model.device)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item()


def experts_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def weights_of(model: torch.nn.Module) -> list:
    """Tensors, or modules with a `QuantizedWeight`."""
    return [getattr(experts, name) for experts in experts_of(model) for name in ("gate_up_proj", "down_proj")]


@torch.no_grad()
def dequantised(dense: torch.nn.Module, quantised: torch.nn.Module) -> torch.nn.Module:
    for w, part in zip(weights_of(dense), weights_of(quantised)):
        w.copy_(part.weight.dequantize(w.dtype))
    return dense


def train_adapters(model: torch.nn.Module, text: torch.Tensor, steps: int, rank: int, options: dict) -> dict:
    """Losses, and bytes: of the experts' weights, dense ones as bf16, and the most that a step takes besides all weights."""
    size = sum(w.numel() * 2 if isinstance(w, torch.Tensor) else w.weight.nbytes for w in weights_of(model))
    torch.manual_seed(options["seed"])      # the same adapters
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.experts = LoraExperts(layer.mlp.experts, rank, 2 * rank, dtype=model.dtype)
    losses = train(model.train(), text, steps, ADAPTERS_RATE, options)
    peak = peak_bytes(lambda: backward(model, text[:options["batch"] * options["seqlen"]].view(options["batch"], -1)), model.device)
    return {"loss": losses, "experts_bytes": size, "peak_bytes": peak}


def compare(base: torch.nn.Module, folder: Path, format: str, steps: int, rank: int, options: dict) -> dict[str, dict]:
    """One model after the other, as each is loaded."""
    from transformers import AutoModelForCausalLM

    from moe_xe.integrations.transformers import load_quantized

    def load(loader: Callable, name: str) -> torch.nn.Module:
        return loader(folder / name, dtype=base.dtype, experts_implementation="moe_xe").to(base.device)

    base.save_pretrained(folder / "dense")
    for _ in quantize_folder(folder / "dense", folder / "quantised", format, 32 if format == "int4" else None):
        pass
    makers = {"quantised": lambda: load(load_quantized, "quantised"),
              "dequantised": lambda: dequantised(load(AutoModelForCausalLM.from_pretrained, "dense"), load(load_quantized, "quantised")),
              "dense": lambda: load(AutoModelForCausalLM.from_pretrained, "dense")}
    return {name: train_adapters(make(), read_source(), steps, rank, options) for name, make in makers.items()}


def summary(trained: dict[str, dict], format: str, options: dict) -> dict:
    losses, dtype = trained["quantised"]["loss"], options["dtype"]
    for name, limits in (("dequantised", (FIRST_TOLERANCE[dtype], TOLERANCE[dtype])), ("dense", (DENSE_LIMIT[format],) * 2)):
        differences = [abs(a - b) for a, b in zip(trained[name]["loss"], losses)]
        found = max(differences[:FIRST_STEPS]), max(differences)
        trained[name] |= {"differences": found, "limits": limits, "agrees": all(map(operator.le, found, limits))}
    return {**options, "format": format, **trained, "agrees": trained["dequantised"]["agrees"] and trained["dense"]["agrees"]}


def show(result: dict, console: Console) -> None:
    table = new_table(
        "experts", "first\nloss", "last\nloss", f"first {FIRST_STEPS} differ\nby (limit)", "all differ\nby (limit)", "weights'\nMB",
        "a step's\npeak MB", text=("experts",), title=f"adapters on {result['format']} and on dense experts, whose weights' MB are bf16's")
    for name in ("quantised", "dequantised", "dense"):
        r = result[name]
        differs = [f"{found:.0e} ({limit:g})" for found, limit in zip(r["differences"], r["limits"])] if "limits" in r else ["", ""]
        table.add_row(name, f"{r['loss'][0]:.4f}", f"{r['loss'][-1]:.4f}", *differs, f"{r['experts_bytes'] / 1e6:.3f}",
                      f"{r['peak_bytes'] / 1e6:.1f}")
    print_table(table, console)
    console.print("the losses agree" if result["agrees"] else "the losses [red]DO NOT AGREE[/red]")


def main(
    format: Annotated[Literal["mxfp4", "int4", "fp8"], typer.Option(help="Of the quantised experts.")] = "mxfp4",
    steps: Annotated[int, typer.Option(help="Steps of the adapters' training.", min=1)] = 100,
    base_steps: Annotated[int, typer.Option(help="Steps of the base's training before.", min=0)] = 200,
    rank: Annotated[int, typer.Option(help="Of the adapters.", min=1)] = 8,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 8,
    seqlen: Annotated[int, typer.Option(help="Bytes of a sequence.", min=2, max=4096)] = 128,
    hidden_size: Annotated[int, typer.Option(help="A multiple of 32; the experts' intermediate size, too.", min=32)] = 128,
    experts: Annotated[int, typer.Option(help="Experts of a layer; each token has 2.", min=2)] = 16,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of activations and adapters.")] = "fp32",
    device: Annotated[Literal["cpu", "xpu"], typer.Option(help="Where to train.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of parameters, adapters and batches.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
):
    """Train adapters on quantised experts and on dense ones; exit status 1 if their losses differ by more than the limits."""
    if hidden_size % 32:
        raise typer.BadParameter(f"must be a multiple of 32, got {hidden_size}", param_hint="--hidden-size")
    if device == "xpu" and not torch.xpu.is_available():
        raise typer.BadParameter("torch finds no xpu device here", param_hint="--device")
    console = Console(stderr=json, highlight=False)
    try:
        from moe_xe.integrations import transformers
        transformers.register()
    except ImportError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1)
    from transformers.utils import logging
    logging.disable_progress_bar()
    options = {"batch": batch, "seqlen": seqlen, "hidden_size": hidden_size, "experts": experts, "top_k": 2, "dtype": dtype, "seed": seed}
    base = make_model("moe_xe", options, torch.device(device))
    train(base, read_text(), base_steps, BASE_RATE, options)
    with TemporaryDirectory() as folder:
        result = summary(compare(base, Path(folder), format, steps, rank, options), format, options)
    print(jsonlib.dumps(result)) if json else show(result, console)
    if not result["agrees"]:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
