"""Where tables go."""
import sys

from rich.console import Console


def table_console() -> Console:
    """The terminal, or, for a file or pipe, lines wide enough for any of our tables."""
    return Console(width=None if sys.stdout.isatty() else 120)
