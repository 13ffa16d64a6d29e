"""moe-xe quantize: a dense checkpoint with its experts in 4 or 8 bits."""
import json as jsonlib
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress

from .tables import plain

_TOKENS = 32


def quantize(
    model_dir: Annotated[Path, typer.Argument(help="A dense model's folder, in safetensors.")],
    out_dir: Annotated[Path, typer.Argument(help="The folder to write; what is in it already is not made again.")],
    format: Annotated[str, typer.Option(help="int4, mxfp4 or fp8.")] = "int4",
    group: Annotated[Optional[int], typer.Option(help="Weights that share a scale: so many columns, of fp8 a square block; default: 128, "
                                                      "of mxfp4 32.")] = None,
    report: Annotated[Optional[bool], typer.Option("--report/--no-report", help="The logits' error on random tokens; default: if memory "
                                                                                "allows.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
):
    """Quantise the experts' weights of a model, shard by shard, for moe_xe.integrations.transformers.load_quantized and other libraries."""
    from ..quantized.folder import quantize_folder

    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with Progress(console=errors, transient=True) as progress:
            task = progress.add_task("shards", total=None)
            for done, total in quantize_folder(model_dir, out_dir, format, group):
                progress.update(task, completed=done, total=total)
    except (ValueError, TypeError, OSError, ImportError) as error:
        errors.print(plain(error), markup=False)
        raise typer.Exit(1)
    sizes = {name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
             for name, folder in (("dense", model_dir), ("quantised", out_dir))}
    found = {"bytes": sizes}
    if report or (report is None and _fits(sizes["dense"])):
        try:
            found["logits"] = _logits_error(model_dir, out_dir)
        except (ValueError, OSError, ImportError) as error:
            errors.print(f"no report: {plain(error)}", markup=False)
            if report:
                raise typer.Exit(1)
    if json:
        print(jsonlib.dumps(found, indent=1))
        return
    print(f"{plain(out_dir)}: {sizes['quantised'] / 1e9:.3f} GB, of {sizes['dense'] / 1e9:.3f} GB dense")
    if "logits" in found:
        print(f"logits of {_TOKENS} random tokens: error {found['logits']['error']:.2%} in norm, the same next token for "
              f"{found['logits']['same_token']:.0%}")


def _fits(size: int) -> bool:
    import torch

    from ..bench.memory import available_bytes

    return available_bytes(torch.device("cpu")) > 1.2 * size


def _logits_error(model_dir: Path, out_dir: Path) -> dict[str, float]:
    """Of the quantised model beside the dense one, which are not in memory together."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ..integrations.transformers import load_quantized, register

    register()
    logging.disable_progress_bar()
    tokens, logits = None, []
    for load, folder in ((AutoModelForCausalLM.from_pretrained, model_dir), (load_quantized, out_dir)):
        model = load(folder, experts_implementation="moe_xe")
        if tokens is None:
            tokens = torch.randint(model.config.get_text_config().vocab_size, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits.append(model(tokens, use_cache=False).logits[0].float())
        del model
    dense, quantised = logits
    return {"error": ((quantised - dense).norm() / dense.norm()).item(),
            "same_token": (quantised.argmax(1) == dense.argmax(1)).float().mean().item()}
