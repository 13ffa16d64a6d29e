"""moe-xe tune: measured choices ahead of time."""
import json as jsonlib
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress

from .bench import _choose, _device, _token_counts, _weights
from .choices import choice_row, choices_table
from .tables import print_table


def tune(
    model: Annotated[str, typer.Option(help="Comma-separated: qwen3, llama4, gpt-oss, deepseek, mixtral.")] = "qwen3",
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts.")] = "1,16,256,1024",
    dtype: Annotated[str, typer.Option(help="Comma-separated: bf16, fp16, fp32.")] = "bf16",
    weights: Annotated[str, typer.Option(help="Comma-separated: dense, or as in checkpoints: mxfp4, int4, fp8, int8, w8a8.")] = "dense",
    device: Annotated[Optional[str], typer.Option(help="cpu or xpu; default: xpu where torch finds one.")] = None,
    scale: Annotated[float, typer.Option(min=1, help="Divides hidden and intermediate sizes, each then the nearest "
                                                     "multiple of 64; experts and top-k stay.")] = 1.0,
    seconds: Annotated[Optional[float], typer.Option(help="For measuring one problem; default: $MOE_XE_TUNE_SECONDS, else 3.",
                                                     min=0)] = None,
    training: Annotated[bool, typer.Option("--training", help="Backward as well as forward.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """Measure the configurations of models' blocks ahead of time, on random weights and tokens, for later autotune=True.

    What is known already, for this device, driver and version, is not measured again.
    """
    from ..bench.block import DTYPES, check_memory
    from ..bench.block_models import FAMILIES
    from ..tuning import default_tuner

    blocks = [(m, d, w) for m in _choose(model, FAMILIES, "--model") for d in _choose(dtype, DTYPES, "--dtype")
              for w in _weights(weights, training)]
    token_counts, where = _token_counts(tokens), _device(device)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        tuner = default_tuner()
        for name, dtype_name, weights_name in blocks:
            check_memory(name, scale, max(token_counts), DTYPES[dtype_name], where, training, weights_name != "dense")
    except (ValueError, MemoryError) as error:
        errors.print(str(error), markup=False)
        raise typer.Exit(1)
    tuner.progress = False    # a bar over cases instead
    tuner.seconds = tuner.seconds if seconds is None else seconds
    choices, seen = [], set()
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("tuning", total=len(blocks) * len(token_counts))
        for name, dtype_name, weights_name in blocks:
            for count in _runs(name, scale, DTYPES[dtype_name], weights_name, token_counts, where, training):
                known = tuner.known()
                choices += [(name, dtype_name, weights_name, count, key, entry) for key, entry in known.items() if key not in seen]
                seen |= known.keys()
                progress.advance(task)
    if json:
        print(jsonlib.dumps([{"model": name, "dtype": dtype_name, "weights": weights_name, "tokens": count, "key": key.facts(),
                              "entry": entry.as_dict(), "speedup": entry.speedup}
                             for name, dtype_name, weights_name, count, key, entry in choices], indent=1))
        return
    for block in dict.fromkeys(tuple(names) for *names, _, _, _ in choices):
        table = choices_table(f"chosen on {where.type}: {block[0]}, {block[1]}{'' if block[2] == 'dense' else f', {block[2]} weights'}", "tokens")
        for *names, count, key, entry in choices:
            if tuple(names) == block:
                table.add_row(str(count), *choice_row(key, entry))
        print_table(table)


def _runs(name, scale, dtype, weights_name, token_counts, device, training):
    """Runs one family's block with autotune for each token count, and yields the count."""
    import torch

    from ..bench import block_models
    from ..ops.block.fused_moe import Fusions
    from ..plan.formats import CHECKPOINTS

    family = block_models.scaled(block_models.FAMILIES[name], scale)
    weights = block_models.make_weights(family, dtype, device, training)
    if weights_name != "dense":
        weights, _ = block_models.quantised(family, weights, CHECKPOINTS[weights_name])
    for tokens in token_counts:
        with torch.inference_mode(not training):
            inputs = block_models.make_inputs(family, tokens, dtype, device, training)
            out = block_models.run_fused(family, weights, inputs, Fusions(), autotune=True)
            if training:
                out.backward(torch.randn_like(out))
        yield tokens
