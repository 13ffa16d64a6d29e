"""The MoE GEMM on real routing data: both GEMMs of every layer, timed and verified.

    python examples/moe_gemm.py                          # gpt-oss-20b, rows per expert recorded in a real prefill
    python examples/moe_gemm.py --n 768 --k 2048 --rows my_rows.json --dtype fp16 --schedule static

Options and meanings follow CUTLASS's MoE GEMM example for Intel GPUs: in each layer the first GEMM has N = 2n and K = k
(gate and up projections), the second N = k and K = n (down projection).
"""
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import moe_xe
from moe_xe.bench.numerics import agrees, difference, reference_grouped_gemm
from moe_xe.bench.roofline import gemm_bytes, record_for
from moe_xe.bench.workloads import load_layers, recorded_layers
from moe_xe.cli.tables import new_table, print_table, short
from moe_xe.plan.problem import Dtype
from moe_xe.plan.model.schedule import simulate
from moe_xe.timing import timed

DTYPES = {"bf16": (torch.bfloat16, Dtype.bf16), "fp16": (torch.float16, Dtype.f16), "fp32": (torch.float32, Dtype.f32)}
CPU_LAYERS = 2      # of 24: about 0.8 TFLOP of GEMMs an iteration, under two minutes on two cores


def run_gemm(layer: int, n: int, k: int, counts: list[int], w: torch.Tensor, dtype: str, schedule: str, iterations: int,
             verify: bool) -> dict:
    """Times one grouped GEMM on random activations and compares it with a float32 reference."""
    torch_dtype, plan_dtype = DTYPES[dtype]
    a = torch.randn(sum(counts), k, dtype=torch_dtype, device=w.device)
    rows = torch.tensor(counts, dtype=torch.int32, device=w.device)
    out = torch.full((sum(counts), n), float("nan"), dtype=torch_dtype, device=w.device)

    def gemm():
        moe_xe.grouped_gemm(a, w, rows, out=out, schedule=schedule)

    gemm()      # compiles on first use
    plan = moe_xe.explain(a, w, rows, out=out, schedule=schedule)
    seconds = sum(timed(gemm, w.device) for _ in range(iterations)) / iterations
    flops = 2 * sum(counts) * n * k
    num_bytes = gemm_bytes(counts, n, k, torch_dtype.itemsize, torch_dtype.itemsize)
    record = record_for(w.device)
    result = {"layer": layer, "experts": len(counts), "rows": sum(counts), "n": n, "k": k, "ms": 1e3 * seconds,
              "gflops": flops / seconds / 1e9, "gbytes_per_s": num_bytes / seconds / 1e9,
              "m_occupancy": simulate(counts, n, plan.config, plan.num_groups).occupancy,
              "roofline_ms": record and 1e3 * record.roofline_seconds(flops, num_bytes, plan_dtype), "verified": None}
    if verify:
        reference = reference_grouped_gemm(a, w, counts)
        result |= {"verified": agrees(out, reference, k), "max_error": difference(out, reference).max_error}
    return result


def show(results: list[dict], console: Console) -> None:
    table = new_table("layer", "rows", "N x K", "M-occ.", "ms", "GFLOP/s", "GB/s", "roof ms", "verified")
    for r in results:
        roofline = "unknown" if r["roofline_ms"] is None else short(r["roofline_ms"])
        verified = {None: "-", True: "passed", False: "[red]FAILED[/red]"}[r["verified"]]
        table.add_row(str(r["layer"]), str(r["rows"]), f"{r['n']} x {r['k']}", f"{r['m_occupancy']:.2f}", short(r["ms"]),
                      f"{r['gflops']:.0f}", f"{r['gbytes_per_s']:.1f}", roofline, verified)
    print_table(table, console)
    console.print("averages over the iterations; M-occ.: useful rows / rows computed; roof: the roofline's time")
    total_ms = sum(r["ms"] for r in results)
    if total_ms:
        flops = sum(2 * r["rows"] * r["n"] * r["k"] for r in results)
        console.print(f"{len(results)} GEMMs, {total_ms:.1f} ms, {flops / total_ms / 1e6:.0f} GFLOP/s over all")


def main(
    n: Annotated[int, typer.Option(help="Intermediate size: the GEMMs are N=2n,K=k and N=k,K=n.", min=1)] = 2880,
    k: Annotated[int, typer.Option(help="Hidden size.", min=1)] = 2880,
    num_layers: Annotated[Optional[int], typer.Option(
        "--num_layers", min=1, help=f"Layers to run. [default: 24; {CPU_LAYERS} on the CPU device]")] = None,
    verify: Annotated[int, typer.Option(help="1: compare with a float32 reference, 0: do not.", min=0, max=1)] = 1,
    device: Annotated[Optional[str], typer.Option(help="xpu or cpu. [default: xpu where there is one]")] = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of activations, weights and output.")] = "bf16",
    rows: Annotated[Optional[Path], typer.Option(help="JSON: layers of rows per expert. [default: recorded gpt-oss-20b]")] = None,
    schedule: Annotated[Literal["dynamic", "static"], typer.Option(help="How work-groups get their tiles.")] = "dynamic",
    iterations: Annotated[Optional[int], typer.Option(min=1, help="Timed runs of each GEMM. [default: 10; 2 on the CPU device]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of tables.")] = False,
):
    """Run the MoE GEMMs of a model's layers on one device; the exit status is 1 if verification fails."""
    console = Console(stderr=json)
    try:
        layers = load_layers(rows) if rows else recorded_layers()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows")
    where = torch.device(device or ("xpu" if torch.xpu.is_available() else "cpu"))
    on_cpu = where.type == "cpu"
    wanted = num_layers or (CPU_LAYERS if on_cpu else 24)
    iterations = iterations or (2 if on_cpu else 10)
    if num_layers is None and on_cpu and wanted < len(layers):
        console.print(f"on the CPU device {wanted} of {len(layers)} layers are run; --num_layers {len(layers)} runs all")
    if wanted > len(layers):
        raise typer.BadParameter(f"there are rows for {len(layers)} layers, got {wanted}", param_hint="--num_layers")
    layers = layers[:wanted]
    record = record_for(where)
    console.print(f"{record.name if record else where}, {dtype}, {schedule} queue, {len(layers)} layers" +
                  (f"; roofline from {record.source}" if record else ""))

    torch.manual_seed(0)
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("GEMMs", total=2 * len(layers))
        for gemm_n, gemm_k in ((2 * n, k), (k, n)):
            w = None
            for index, counts in enumerate(layers):
                if w is None or w.shape[0] != len(counts):
                    w = torch.randn(len(counts), gemm_n, gemm_k, dtype=DTYPES[dtype][0], device=where).mul_(gemm_k**-0.5)
                results.append(run_gemm(index, gemm_n, gemm_k, counts, w, dtype, schedule, iterations, bool(verify)))
                progress.advance(task)
    results.sort(key=lambda r: r["layer"])
    print(jsonlib.dumps(results, indent=1)) if json else show(results, console)
    if verify and not all(r["verified"] for r in results):
        console.print("[red]verification failed[/red]")
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
