"""moe-xe bench: our kernels and their peers in one run."""
import json as jsonlib
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .tables import table_console

app = typer.Typer(help="Benchmarks against torch's own ways, in turn, medians.", no_args_is_help=True)


@app.callback()
def _keep_subcommands():
    """One more command than `gemm` will come; without this typer would fold a single one into its parent."""


@app.command()
def gemm(
    model: Annotated[str, typer.Option(help="Comma-separated models.")] = "gpt-oss-20b,qwen3-30b-a3b,mixtral-8x7b",
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts.")] = "1,4,16,1024,4096",
    dtype: Annotated[str, typer.Option(help="Comma-separated: bf16, fp16, fp32.")] = "bf16,fp16,fp32",
    device: Annotated[str, typer.Option(help="cpu or xpu.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Time for each case, beyond three rounds.", min=0)] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """The grouped GEMM against torch.nn.functional.grouped_mm and a torch.mm an expert; both GEMMs of each model."""
    import torch

    from ..bench.gemm import DTYPES, run_case
    from ..bench.workloads import MODELS

    def choose(text: str, known, option: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise typer.BadParameter(f"expected some of {', '.join(known)}, got {name!r}", param_hint=option)
        return names

    models, dtypes = choose(model, MODELS, "--model"), choose(dtype, DTYPES, "--dtype")
    try:
        token_counts = [int(count) for count in tokens.split(",")]
    except ValueError:
        token_counts = [0]
    if min(token_counts) < 1:
        raise typer.BadParameter(f"expected positive whole numbers, got {tokens!r}", param_hint="--tokens")
    cases = [(m, g, t, d) for d in dtypes for m in models for g in (0, 1) for t in token_counts]
    results = [run_case(MODELS[m], g, t, d, torch.device(device), seconds)
               for m, g, t, d in track(cases, "measuring", console=Console(stderr=True), transient=True)]
    if json:
        print(jsonlib.dumps([result.as_dict() for result in results], indent=1))
    else:
        table = Table("model", "N x K", "tokens", "dtype", "moe_xe", "grouped_mm", "mm loop", "speed-up", "GFLOP/s", "GB/s", "right",
                      box=box.SIMPLE_HEAD, pad_edge=False, title="milliseconds; speed-up: against torch's faster path")
        for r in results:
            table.add_row(r.model, f"{r.n} x {r.k}", str(r.tokens), r.dtype, f"{r.moe_xe_ms:.3f}", f"{r.grouped_mm_ms:.3f}",
                          f"{r.mm_loop_ms:.3f}", f"{r.speedup:.2f}", f"{r.gflops:.0f}", f"{r.gbytes_per_s:.1f}", "yes" if r.correct else "NO")
        table_console().print(table)
    if not all(result.correct for result in results):
        raise typer.Exit(1)
