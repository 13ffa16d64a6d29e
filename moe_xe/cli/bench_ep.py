"""moe-xe bench ep: experts on several ranks, against torch's own all-to-all."""
import json as jsonlib
from typing import Annotated, Optional

import typer
from rich.console import Console

from .bench import _choose, _token_counts
from .tables import new_table, print_table, short


def ep(
    ranks: Annotated[int, typer.Option(help="Processes to start, each with as many experts.", min=2)] = 4,
    model: Annotated[str, typer.Option(help="Comma-separated models.")] = "qwen3-30b-a3b",
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts, of each rank.")] = "16,256",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    scale: Annotated[float, typer.Option(min=1, help="Divides hidden and intermediate sizes; experts and top-k stay.")] = 1.0,
    chunks: Annotated[Optional[int], typer.Option(help="Parts of the tokens that travel while others are computed; default: moe_xe's choice.",
                                                  min=1)] = None,
    wire: Annotated[Optional[str], typer.Option(help="Rows go to the experts as int8 or fp8_e4m3.")] = None,
    wire_back: Annotated[Optional[str], typer.Option(help="And so they come back.")] = None,
    delay: Annotated[float, typer.Option(help="Milliseconds that a link takes for each MB of a rank's messages; on cpu.", min=0)] = 0.0,
    device: Annotated[str, typer.Option(help="cpu (gloo), or xpu (xccl): a device for each rank.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Of all ways in turn, of which medians are taken.", min=1)] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """`moe_xe.distributed`'s dispatch, combine and whole block, against the same in torch alone: a row for each pair of token and expert,
    permutations and grouped_mm. Exit status 1 if a block is wrong."""
    import torch

    from ..bench.expert_parallel import DTYPES, Options, check_memory, run
    from ..bench.workloads import MODELS
    from ..distributed.message import WIRES

    names, counts, (dtype,) = _choose(model, MODELS, "--model"), _token_counts(tokens), _choose(dtype, DTYPES, "--dtype")[:1]
    for option, given in (("--wire", wire), ("--wire-back", wire_back)):
        _choose(given or "int8", WIRES, option)
    _choose(device, ("cpu", "xpu"), "--device")
    for name in names:
        if MODELS[name].num_experts % ranks:
            raise typer.BadParameter(f"must divide {name}'s {MODELS[name].num_experts} experts, got {ranks}", param_hint="--ranks")
    if device == "xpu" and torch.xpu.device_count() < ranks:
        raise typer.BadParameter(f"torch finds {torch.xpu.device_count()} xpu devices here, of {ranks}", param_hint="--device")
    if device == "xpu" and delay:
        raise typer.BadParameter("is for --device cpu", param_hint="--delay")
    options = Options(ranks, device, dtype, scale, chunks, wire, wire_back, delay, rounds)
    try:
        check_memory(names, options)
    except MemoryError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        raise typer.Exit(1)
    results = run(names, counts, options)
    if json:
        print(jsonlib.dumps([result.as_dict() for result in results], indent=1))
    else:
        _print(results)
    if not all(result.correct for result in results):
        raise typer.Exit(1)


def _print(results) -> None:
    options = results[0].options
    for name in dict.fromkeys(result.model for result in results):
        table = new_table("tokens", "dis-\npatch", "plain", "com-\nbine", "plain", "block", "plain", "speed\n-up", "sent\nMB", "plain\nMB", "right",
                          text=("right",),
                          title=f"{name}, {options.dtype}, {options.ranks} ranks on {options.device}: milliseconds of the slowest rank")
        for r in (r for r in results if r.model == name):
            times = (short(way[part]) for part in ("dispatch", "combine", "block") for way in (r.moe_xe_ms, r.plain_ms))
            table.add_row(str(r.tokens), *times, f"{r.speedup['block']:.2f}", short(r.sent_bytes / 1e6), short(r.plain_sent_bytes / 1e6),
                          "yes" if r.correct else "NO")
        print_table(table)
    notes = [f"scale {options.scale:g}", f"chunks {options.chunks or 'as moe_xe chooses'}", f"rows as {options.wire or options.dtype}",
             f"back as {options.wire_back or options.dtype}", f"a link of {options.delay:g} ms for each MB"]
    Console().print(f"{', '.join(notes)}; plain: torch's all-to-all, a row for each pair of token and expert, and grouped_mm; "
                    "MB: of all ranks, there and back", highlight=False, soft_wrap=True)
