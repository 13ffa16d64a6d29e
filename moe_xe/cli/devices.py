"""moe-xe devices: what moe_xe can run on here."""
import json as jsonlib
import os
from typing import Annotated

import typer
from rich.console import Console

from .tables import new_table, print_table

FIELDS = ("name", "kind", "backend", "architecture", "driver_version", "xe_cores", "compute_units", "global_mem_bytes",
          "local_mem_bytes", "sub_group_sizes", "has_fp16", "has_matrix_engine", "has_system_memory")


def _instructions(facts) -> dict[str, str | None]:
    """Of a CPU: the vector instructions of its kernels, which may be the environment's choice, and the newest that it has."""
    from ..plan.gemm.heuristics import ISA_VARIABLE, chosen_isa
    from ..runtime import cpu_isa

    if facts.kind != "cpu":
        return {"isa": None, "best_isa": None}
    try:
        return {"isa": chosen_isa(cpu_isa(), facts.name, os.environ.get(ISA_VARIABLE, "")), "best_isa": cpu_isa()}
    except ValueError as error:
        raise typer.BadParameter(str(error))


def devices(json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False):
    """List the SYCL devices that moe_xe can use; what failed is said on stderr."""
    from .. import runtime

    stderr = Console(stderr=True, soft_wrap=True, highlight=False)
    for failed in (platform for platform in runtime.platforms() if platform.errors):
        stderr.print(f"{failed.name} ({failed.backend}) failed: {'; '.join(failed.errors)}", markup=False)
        stderr.print("  its devices are not used; moe-xe doctor shows its driver and its loader", markup=False)
    found = [{field: getattr(facts, field) for field in FIELDS} | _instructions(facts) for facts in runtime.devices()]
    if json:
        print(jsonlib.dumps(found, indent=1))
        return
    if not found:
        stderr.print("no SYCL device: install an Intel GPU driver, or the CPU device: pip install 'moe_xe[cpu]'")
        raise typer.Exit(1)
    for facts in found:
        table = new_table("name", facts["name"], text=("name", facts["name"]))
        for field, value in facts.items():
            if field != "name" and value is not None:
                table.add_row(field, str(value))
        print_table(table)
