"""Tables that read well in a terminal of 80 columns."""
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ROOMY, _NARROW = (0, 1), (0, 0)


def new_table(*heads: str, title: str = "", text: tuple[str, ...] = ()) -> Table:
    """Columns of numbers, and, for the heads in `text`, of words. A head may have two lines."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title)
    for head in heads:
        table.add_column(head, justify="left" if head in text else "right", no_wrap=True, vertical="top")
    return table


def print_table(table: Table, console: Console | None = None) -> None:
    """Every cell in full: with less between the columns, or beyond a terminal that is still too narrow. A file or pipe has 120 columns."""
    console = console or Console()
    terminal, title = console.width, table.title
    table.title, console.width = None, 1000
    for table.padding in (_ROOMY, _NARROW):
        needed = Measurement.get(console, console.options, table).maximum
        if needed <= (terminal if console.is_terminal else 120):
            break
    console.width = terminal
    if title:
        console.print(title, style="bold", highlight=False)
    console.width = max(needed, terminal)
    console.print(table, "")
    console.width = terminal


def plain(value: object) -> str:
    """What a terminal takes for text and nothing else; names of files and messages about them may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(value))


def short(value: float | None) -> str:
    """At least four digits: 1.234, 12.34, 123.4, 12345; "-" for None."""
    return "-" if value is None else next((f"{value:.{digits}f}" for bound, digits in ((9.9995, 3), (99.995, 2), (999.95, 1)) if value < bound), f"{value:.0f}")
