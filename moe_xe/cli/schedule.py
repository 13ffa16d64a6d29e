"""moe-xe schedule: how well the tile queue fills a device, without one."""
import json as jsonlib
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..plan.gemm import config
from ..plan.model.devices import record_of
from ..plan.model.schedule import simulate
from ..plan.problem import Dtype, GroupedGemmProblem
from ..plan.xe.candidates import choose_xe_config
from .tables import new_table, print_table


def schedule(
    rows: Annotated[Optional[Path], typer.Option(help="JSON: layers of rows per expert; default: recorded gpt-oss-20b.")] = None,
    n: Annotated[int, typer.Option(help="Columns of the output.", min=1)] = 5760,
    k: Annotated[int, typer.Option(help="Length of the dot products.", min=1)] = 2880,
    cores: Annotated[int, typer.Option(help="Work-groups: Xe cores of the device.", min=1)] = 20,
    policy: Annotated[config.Schedule, typer.Option("--schedule", help="Who takes which tile.")] = config.Schedule.dynamic,
    json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
):
    """Useful work / (makespan x cores) of each layer in the default configuration, a tile's cost being its height x width."""
    from ..bench.workloads import load_layers, recorded_layers

    try:
        layers = load_layers(rows) if rows else recorded_layers()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows")
    problem = GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16)
    device = record_of(f"{cores} Xe cores", cores)
    reports, configs = [], []
    for counts in layers:
        configs.append(choose_xe_config(problem, sum(counts), len(counts), device, policy))
        reports.append(simulate(counts, n, configs[-1], cores))
    mean = sum(report.efficiency for report in reports) / len(reports)
    if json:
        print(jsonlib.dumps({"n": n, "k": k, "cores": cores, "schedule": policy.value, "config": str(configs[0]), "efficiency": mean, "layers": [
            {"efficiency": r.efficiency, "occupancy": r.occupancy, "num_tiles": r.num_tiles, "makespan": r.makespan,
             "useful": r.useful, "computed": r.computed, "tiles_per_height": r.tiles_per_height} for r in reports]}, indent=1))
        return
    heights = sorted({height for report in reports for height in report.tiles_per_height}, reverse=True)
    table = new_table("layer", "rows", *(f"{height} x\n{configs[0].tile_width}" for height in heights), "occupancy", "efficiency",
                      title=f"N = {n}, {cores} cores, {policy.value} queue: tiles by height x width")
    for index, (counts, report) in enumerate(zip(layers, reports)):
        table.add_row(str(index), str(sum(counts)), *(str(report.tiles_per_height.get(height, 0)) for height in heights),
                      f"{report.occupancy:.3f}", f"{report.efficiency:.3f}")
    print_table(table)
    print(f"mean efficiency: {mean:.3f}")
