"""A table of the tuner's choices."""
from dataclasses import fields

from rich.markup import escape
from rich.table import Table

from .tables import new_table


def choices_table(title: str, *first: str, last: tuple[str, ...] = ()) -> Table:
    """An empty table for rows of `choice_row`, with columns of the caller's before and after."""
    problem = "problem\n  untuned tile\n  what was chosen instead"
    return new_table(*first, problem, "rows", "skew", "us\nbefore", "us", "gain", *last, title=title, text=(problem, *last))


def choice_row(key, entry) -> list[str]:
    """The cells of a TuningKey and its Entry. rows: at most so many; chosen: what is different from untuned, a line for each."""
    problem = dict(key.problem)
    shape = "x".join(str(problem[name]) for name in ("n", "k", "p", "q") if name in problem)
    heights = getattr(entry.default, "heights", None)
    tiles = (f"{entry.default.tile_rows}x{entry.default.tile_columns}" if heights is None else
             f"{_text(heights)}x{entry.default.tile_width}")
    changes = [f"{field.name} {_text(getattr(entry.config, field.name))}" for field in fields(entry.config)
               if getattr(entry.config, field.name) != getattr(entry.default, field.name)]
    lines = [f"{key.op.removeprefix('grouped_')} {shape}, {key.num_experts} experts", tiles, *(changes or ["the same"])]
    return [escape("\n  ".join(lines)), str(key.rows_bucket), escape(str(key.skew_bucket)),
            f"{entry.microseconds[entry.default]:.0f}", f"{entry.microseconds[entry.config]:.0f}", f"{entry.speedup - 1:.0%}"]


def _text(value) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
