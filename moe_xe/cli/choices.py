"""A table of the tuner's choices."""
from dataclasses import fields

from rich import box
from rich.markup import escape
from rich.table import Table


def choices_table(title: str, *first: str, last: tuple[str, ...] = ()) -> Table:
    """An empty table for rows of `choice_row`, with columns of the caller's before and after."""
    table = Table(*first, box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title=title)
    table.add_column("problem", no_wrap=True)
    for head in ("experts", "rows", "skew"):
        table.add_column(head, justify="right")
    table.add_column("untuned")
    table.add_column("chosen")
    for head in ("us before", "us", "gain"):
        table.add_column(head, justify="right")
    for head in last:
        table.add_column(head)
    return table


def choice_row(key, entry) -> list[str]:
    """The cells of a TuningKey and its Entry. rows: at most so many; chosen: what is different from untuned."""
    problem = dict(key.problem)
    shape = "x".join(str(problem[name]) for name in ("n", "k", "p", "q") if name in problem)
    heights = getattr(entry.default, "heights", None)
    tiles = (f"{entry.default.tile_rows}x{entry.default.tile_columns}" if heights is None else
             f"{_text(heights)}x{entry.default.tile_width}")
    changes = [f"{field.name} {_text(getattr(entry.config, field.name))}" for field in fields(entry.config)
               if getattr(entry.config, field.name) != getattr(entry.default, field.name)]
    return [escape(f"{key.op.removeprefix('grouped_')} {shape}"), str(key.num_experts), str(key.rows_bucket),
            escape(str(key.skew_bucket)), tiles, ", ".join(changes) or "the same", f"{entry.microseconds[entry.default]:.0f}",
            f"{entry.microseconds[entry.config]:.0f}", f"{entry.speedup - 1:.0%}"]


def _text(value) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
