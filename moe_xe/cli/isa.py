"""moe-xe isa: the machine code of the kernels for Intel's GPUs, without one."""
import json as jsonlib
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ..plan.problem import Dtype
from .tables import new_table, print_table

COLUMNS = {"device": "device", "dtype": "dtype", "layout": "layout", "gathered": "gather", "grf": "GRF", "spill_bytes": "spill",
           "slm_bytes": "SLM", "dpas": "dpas", "messages": "msgs", "other": "other", "other_per_dpas": "/ dpas"}


def isa(
    device: Annotated[str, typer.Option(help="Comma-separated targets of ocloc: bmg, pvc, lnl-m, ptl-h, ...")] = "bmg",
    n: Annotated[int, typer.Option(help="Columns of the output.", min=1)] = 5760,
    k: Annotated[int, typer.Option(help="Length of the dot products.", min=1)] = 2880,
    dtype: Annotated[str, typer.Option(help="Comma-separated: bf16, f16, f32 (as tf32).")] = "bf16",
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
):
    """Registers, spills and the K loop of the prefill tile, for every variant of the grouped GEMM."""
    from ..isa import ocloc, spirv
    from ..isa.kernels import report, variants

    try:
        dtypes = [Dtype(name.strip()) for name in dtype.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected bf16, f16 or f32, got {dtype!r}", param_hint="--dtype")
    if reason := spirv.missing() or ocloc.missing():
        Console(stderr=True).print(reason)
        raise typer.Exit(1)
    cases = [(target.strip(), problem) for target in device.split(",") for problem in variants(n, k, dtypes)]
    try:
        rows = [report(problem, target) for target, problem in track(cases, "compiling", console=Console(stderr=True), transient=True)]
    except ocloc.OclocError as error:
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(1)
    if json:
        print(jsonlib.dumps(rows, indent=1))
        return
    _print(rows, n, k)


def _print(rows: list[dict], n: int, k: int) -> None:
    table = new_table(*COLUMNS.values(), title=f"{rows[0]['kernel']}, N = {n}, K = {k}: the K loop of the prefill tile",
                      text=("device", "dtype", "layout", "gather"))
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS))
    print_table(table)
