"""moe-xe cache: what is kept on disk."""
import json as jsonlib
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .choices import choice_row, choices_table
from .tables import plain, print_table

app = typer.Typer(help="Compiled kernels and tuning results on disk.", no_args_is_help=True)


@contextmanager
def _failures_exit():
    """What is a warning to a program that only wants a kernel is a failure to one who asks for the cache itself; not so
    damaged entries, which are removed and named on stderr."""
    from ..disk_cache import DamageWarning

    stderr = Console(stderr=True, soft_wrap=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("always", DamageWarning)
            warnings.showwarning = lambda message, *_: stderr.print(plain(message), markup=False, highlight=False)
            yield
    except (RuntimeWarning, OSError, ValueError) as error:
        stderr.print(plain(error), markup=False, highlight=False)
        raise typer.Exit(1)


@app.command("list")
def list_entries(json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False):
    """Every measured choice, where the cache is and how large it is."""
    from ..disk_cache import cache_directory
    from ..jit.cache_key import environment_facts
    from ..jit.compiler import kernel_cache
    from ..runtime import devices
    from ..tuning import default_store

    here = [environment_facts(facts).items() for facts in devices()]
    with _failures_exit():
        directory = cache_directory()
        store = default_store()
        pairs = sorted(store.entries(), key=lambda pair: repr(pair[0]))
        used_here = [any(environment <= key.facts().items() for environment in here) for key, _ in pairs]
        sizes = {"kernels": kernel_cache().volume(), "tuning": store.disk.volume()}
    if json:
        print(jsonlib.dumps({"directory": str(directory), "bytes": sizes, "entries": [
            {"key": key.facts(), "entry": entry.as_dict(), "speedup": entry.speedup, "used_here": used}
            for (key, entry), used in zip(pairs, used_here)]}, indent=1))
        return
    console = Console()
    for device in dict.fromkeys(key.device for key, _ in pairs):
        table = choices_table(f"measured choices: {escape(device)}", last=("here",))
        for (key, entry), used in zip(pairs, used_here):
            if key.device == device:
                table.add_row(*choice_row(key, entry), "yes" if used else "no")
        print_table(table)
    if pairs:
        console.print("here: measured with this version, on this device and driver", highlight=False)
    console.print(f"{plain(directory)}: {len(pairs)} measured choices, {sizes['tuning'] / 1e6:.1f} MB; "
                  f"kernels, {sizes['kernels'] / 1e6:.1f} MB", highlight=False, markup=False, soft_wrap=True)


@app.command("export")
def export_entries(file: Annotated[Path, typer.Argument(help="JSON to write.")]):
    """Write all measured choices to one file."""
    from ..tuning import default_store

    with _failures_exit():
        count = default_store().export_to(file)
    print(f"{count} measured choices written to {plain(file)}")


@app.command("import")
def import_entries(file: Annotated[Path, typer.Argument(help="JSON that export wrote.")]):
    """Add the measured choices of such a file. Those of another device, driver or version are kept, but not used."""
    from ..tuning import default_store

    with _failures_exit():
        count = default_store().import_from(file)
    print(f"{count} measured choices read from {plain(file)}")


@app.command()
def clear(kernels: Annotated[bool, typer.Option("--kernels", help="The compiled kernels too.")] = False):
    """Remove all measured choices, and what was measured of the CPU."""
    from ..bench.roofline import device_cache
    from ..jit.compiler import kernel_cache
    from ..tuning import default_store

    with _failures_exit():
        print(f"{default_store().clear()} measured choices removed")
        device_cache().clear()
        if kernels:
            print(f"{kernel_cache().clear()} kernels removed")
