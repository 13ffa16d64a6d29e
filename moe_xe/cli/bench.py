"""moe-xe bench: our kernels and their peers in one run."""
import json as jsonlib
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress, track

from .tables import new_table, print_table, short

app = typer.Typer(help="Benchmarks against torch's own ways, in turn, medians.", no_args_is_help=True)


def _choose(text: str, known, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"expected some of {', '.join(known)}, got {name!r}", param_hint=option)
    return names


def _weights(text: str, training: bool = False) -> list[str]:
    from ..plan.formats import CHECKPOINTS

    names = _choose(text, ("dense", *CHECKPOINTS), "--weights")
    if training and set(names) != {"dense"}:
        raise typer.BadParameter(f"expected dense in training, got {text!r}", param_hint="--weights")
    return names


def _token_counts(text: str) -> list[int]:
    return _counts(text, "--tokens")


def _counts(text: str, option: str) -> list[int]:
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise typer.BadParameter(f"expected positive whole numbers, got {text!r}", param_hint=option)
    return counts


@app.command()
def gemm(
    model: Annotated[str, typer.Option(help="Comma-separated models.")] = "gpt-oss-20b,qwen3-30b-a3b,mixtral-8x7b",
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts.")] = "1,4,16,1024,4096",
    dtype: Annotated[str, typer.Option(help="Comma-separated: bf16, fp16, fp32.")] = "bf16,fp16,fp32",
    weights: Annotated[str, typer.Option(help="Comma-separated: dense, or as in checkpoints: mxfp4, int4, fp8, int8, w8a8.")] = "dense",
    device: Annotated[str, typer.Option(help="cpu or xpu.")] = "cpu",
    autotune: Annotated[bool, typer.Option("--autotune", help="In the fastest measured configurations.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for each case, beyond three rounds.", min=0)] = 2.0,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """The grouped GEMM against torch.nn.functional.grouped_mm and a torch.mm an expert; both GEMMs of each model. Of quantised weights
    torch's ways have the dequantised numbers."""
    import torch

    from ..bench.gemm import DTYPES, run_case
    from ..bench.workloads import MODELS

    models, dtypes, formats = _choose(model, MODELS, "--model"), _choose(dtype, DTYPES, "--dtype"), _weights(weights)
    cases = [(m, g, t, d, w) for d in dtypes for w in formats for m in models for g in (0, 1) for t in _token_counts(tokens)]
    results = [run_case(MODELS[m], g, t, d, torch.device(device), seconds, autotune, w)
               for m, g, t, d, w in track(cases, "measuring", console=Console(stderr=True), transient=True)]
    if json:
        print(jsonlib.dumps([result.as_dict() for result in results], indent=1))
    else:
        _print_gemms(results)
    if not all(result.correct for result in results):
        raise typer.Exit(1)


def _print_gemms(results) -> None:
    for dtype, weights in dict.fromkeys((r.dtype, r.weights) for r in results):
        quantised = weights != "dense"      # then moe_xe's own time on dense weights says more than GFLOP/s
        table = new_table("model", "N x K", "tokens", "moe_xe", *(["on\ndense"] if quantised else []), "grouped\n_mm", "mm\nloop", "speed\n-up",
                          *([] if quantised else ["GFLOP\n/s"]), "GB/s", "right", text=("model", "right"),
                          title=f"{dtype}{f', {weights} weights' if quantised else ''}: milliseconds; speed-up: against torch's faster path")
        for r in (r for r in results if (r.dtype, r.weights) == (dtype, weights)):
            dense, rate = ([short(r.moe_xe_dense_ms)], []) if quantised else ([], [f"{r.gflops:.0f}"])
            table.add_row(r.model, f"{r.n} x {r.k}", str(r.tokens), short(r.moe_xe_ms), *dense, short(r.grouped_mm_ms), short(r.mm_loop_ms),
                          f"{r.speedup:.2f}", *rate, f"{r.gbytes_per_s:.1f}", "yes" if r.correct else "NO")
        print_table(table)


@app.command()
def block(
    model: Annotated[str, typer.Option(help="Comma-separated: qwen3, llama4, gpt-oss, deepseek, mixtral.")] = "qwen3",
    mode: Annotated[str, typer.Option(help="forward, backward (of a forward pass that is not timed), or both.")] = "forward",
    seqlen: Annotated[Optional[int], typer.Option(help="Tokens of a sequence; default 1024.", min=1)] = None,
    batch: Annotated[Optional[int], typer.Option(help="Sequences; default 1.", min=1)] = None,
    tokens: Annotated[Optional[str], typer.Option(help="Comma-separated counts, instead of seqlen and batch.")] = None,
    permute_x: Annotated[bool, typer.Option("--permute-x", "--permute_x", help="Gather tokens in the first GEMM.")] = False,
    permute_y: Annotated[bool, typer.Option("--permute-y", "--permute_y", help="Put rows back in the second GEMM.")] = False,
    autotune: Annotated[bool, typer.Option("--autotune", help="In the fastest measured configurations.")] = False,
    dtype: Annotated[str, typer.Option(help="Comma-separated: bf16, fp16, fp32.")] = "bf16",
    weights: Annotated[str, typer.Option(help="Comma-separated: dense, or as in checkpoints: mxfp4, int4, fp8, int8, w8a8.")] = "dense",
    device: Annotated[Optional[str], typer.Option(help="cpu or xpu; default: xpu where torch finds one.")] = None,
    scale: Annotated[float, typer.Option(min=1, help="Divides hidden and intermediate sizes, each then the nearest "
                                                     "multiple of 64; experts and top-k stay.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="Time for each case, beyond three rounds.", min=0)] = 2.0,
    plot: Annotated[Optional[Path], typer.Option(help="PNG: time and share of the roofline over 1 to 8192 tokens.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """The experts of a model's block, shared ones included, from hidden states and routing to the output: moe_xe against
    Transformers' eager, grouped_mm and batched_mm on the same weights, dequantised where ours are quantised. Backward: the gradients
    of hidden states, routing weights and all parameters.

    Exit status 1 if an output or a gradient is wrong.
    """
    from ..bench.block import DTYPES, MODES, check_memory, run_family
    from ..bench.block_models import FAMILIES
    from ..bench.block_peers import require_transformers
    from ..bench.plot import plot_blocks, require_matplotlib
    from ..ops.block.fused_moe import Fusions

    if mode not in MODES:
        raise typer.BadParameter(f"expected one of {', '.join(MODES)}, got {mode!r}", param_hint="--mode")
    training = mode != "forward"
    cases = [(m, d, w) for m in _choose(model, FAMILIES, "--model") for d in _choose(dtype, DTYPES, "--dtype")
             for w in _weights(weights, training)]
    token_counts, where = _block_tokens(tokens, seqlen, batch, plot), _device(device)
    if plot and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {plot.absolute().parent}", param_hint="--plot")
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        require_transformers()
        if plot:
            require_matplotlib()
        for name, dtype_name, weights_name in cases:
            check_memory(name, scale, max(token_counts), DTYPES[dtype_name], where, training, weights_name != "dense")
    except (ImportError, MemoryError) as error:
        errors.print(str(error), markup=False)
        raise typer.Exit(1)
    if training and not (permute_x and permute_y):
        errors.print("--permute-x and --permute-y are always on in training")
    results, fusions = [], Fusions(gather=permute_x, scatter=permute_y)
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases) * len(token_counts))
        for name, dtype_name, weights_name in cases:
            for result in run_family(name, scale, token_counts, dtype_name, where, fusions, seconds, mode, autotune, weights_name):
                results.append(result)
                progress.advance(task)
    if json:
        print(jsonlib.dumps([result.as_dict() for result in results], indent=1))
    else:
        _print_blocks(results, scale)
    if plot:
        plot_blocks(results, plot)
    if not all(result.correct for result in results):
        raise typer.Exit(1)


def _block_tokens(tokens: Optional[str], seqlen: Optional[int], batch: Optional[int], plot: Optional[Path]) -> list[int]:
    sequences = (seqlen, batch) != (None, None)
    if tokens is not None and sequences:
        raise typer.BadParameter("give either --tokens, or --seqlen and --batch", param_hint="--tokens")
    if tokens is not None:
        return _token_counts(tokens)
    return [2**power for power in range(14)] if plot and not sequences else [(seqlen or 1024) * (batch or 1)]


def _device(name: Optional[str]):
    import torch

    if name not in (None, "cpu", "xpu"):
        raise typer.BadParameter(f"expected cpu or xpu, got {name!r}", param_hint="--device")
    if name == "xpu" and not torch.xpu.is_available():
        raise typer.BadParameter("torch finds no xpu device here", param_hint="--device")
    return torch.device(name or ("xpu" if torch.xpu.is_available() else "cpu"))


def _print_blocks(results, scale: float) -> None:
    first = results[0]
    fused = [name for name, on in (("permute_x", first.permute_x), ("permute_y", first.permute_y)) if on]
    for model, dtype, weights in dict.fromkeys((r.model, r.dtype, r.weights) for r in results):
        quantised = weights != "dense"
        table = new_table("tokens", "moe_xe", *(["on\ndense"] if quantised else []), "eager", "grouped\n_mm", "batched\n_mm", "speed\n-up",
                          *([] if quantised else ["GFLOP\n/s"]), "GB/s", "roof-\nline", "peak\nMB", "peer's\nMB", "right", text=("right",),
                          title=f"{model}, {dtype}{f', {weights} weights' if quantised else ''}, {first.mode}: milliseconds on {first.device}")
        for r in (r for r in results if (r.model, r.dtype, r.weights) == (model, dtype, weights)):
            times = map(short, (r.moe_xe_ms, *([r.moe_xe_dense_ms] if quantised else []), r.eager_ms, r.grouped_mm_ms, r.batched_mm_ms))
            table.add_row(str(r.tokens), *times, f"{r.speedup:.2f}", *([] if quantised else [f"{r.gflops:.0f}"]), f"{r.gbytes_per_s:.1f}",
                          "-" if r.roofline is None else f"{r.roofline:.0%}", short(r.moe_xe_peak_bytes / 1e6),
                          short(r.fastest_peer_peak_bytes / 1e6), "yes" if r.correct else "NO")
        print_table(table)
    notes = [f"fused: {', '.join(fused) or 'no permutation'}; speed-up: against the fastest peer; "
             "peak MB: of one call, beyond weights and inputs, and the fastest peer's"]
    for r in {r.model: r for r in results}.values():
        shared = f", shared expert {r.shared_intermediate_size}" if r.shared_intermediate_size else ""
        notes.append(f"{r.model} at scale {scale:g}: hidden {r.hidden_size}, intermediate {r.intermediate_size}{shared}, "
                     f"{r.num_experts} experts, top {r.top_k}")
    for r in results:
        case = f"{r.model} {r.dtype}, {r.weights} weights, at {r.tokens} tokens"
        notes += [f"no {peer} of {case}: {reason}" for peer, reason in r.not_run.items()]
        notes += [f"wrong output of {case}: {', '.join(r.wrong)}"] if r.wrong else []
    for note in notes:
        Console().print(note, highlight=False, markup=False, soft_wrap=True)
