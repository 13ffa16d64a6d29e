"""moe-xe doctor: a report on the machine, its drivers and devices, for people and for bug reports."""
import json as jsonlib
import textwrap
from typing import Annotated

import typer

from .tables import plain

_WIDTH, _INDENT = 80, 20


def doctor(
    seconds: Annotated[float, typer.Option(help="The limit for each device, whose first call compiles.", min=1)] = 180,
    json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
):
    """Versions, drivers, and a small grouped GEMM on each device, as text to paste into a bug report. Fails unless one computes right."""
    from ..doctor.report import sections

    printed, computed = [], False
    for section in sections(seconds):
        computed |= section.computed
        if json:
            printed.append({"title": section.title, "facts": dict(section.rows) if section.facts is None else section.facts})
        else:
            print("\n".join([section.title, *_lines(section.rows), ""]), flush=True)
    if json:
        print(jsonlib.dumps({"computed": computed, "sections": printed}, indent=1))
    elif not computed:
        print("no device computed right")
    raise typer.Exit(0 if computed else 1)


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    """As wide as a terminal is at least, whatever this one is: what is pasted reads the same everywhere."""
    lines = []
    for label, text in rows:
        head = f"  {label}"
        if len(head) >= _INDENT:
            lines += textwrap.wrap(head, _WIDTH, subsequent_indent="  ")
            head = ""
        lines += textwrap.wrap(plain(text) or "-", _WIDTH, initial_indent=head.ljust(_INDENT), subsequent_indent=" " * _INDENT,
                               break_on_hyphens=False)
    return lines
