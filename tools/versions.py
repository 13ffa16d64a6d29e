"""What pip is to install, and what it has installed, for the Makefile.

    python tools/versions.py constraints      # constraints.txt as it holds for this environment
    python tools/versions.py differences      # constraints.txt beside what is installed here
"""
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def name_of(requirement: str) -> str:
    """As PyPI writes it: pydantic_core and Pydantic-Core are one."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def installed(name: str):
    """The distribution, or None."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def pinned_by_torch() -> set[str]:
    """torch, and what it asks for in exactly one version: an XPU build brings its own Intel runtime."""
    found, new = set(), ["torch"]
    while new:
        name = new.pop()
        found.add(name)
        package = installed(name)
        requirements = [text.partition(";") for text in (package and package.requires or ())]
        new += {name_of(wanted) for wanted, _, marker in requirements if "==" in wanted and "extra" not in marker} - found
    return found


def constraints() -> list[str]:
    """The lines for all that torch leaves open. torch is there already: it is installed first, and only where it is missing."""
    kept = pinned_by_torch()
    return [line for line in CONSTRAINTS.read_text().splitlines() if line and line[0] != "#" and name_of(line) not in kept]


def differences() -> list[str]:
    """A line for each package that is installed in another version than the file's."""
    known = {}
    for line in CONSTRAINTS.read_text().splitlines():
        version, _, marker = line.partition("==")[2].partition(" ; ")
        if version and not (marker.startswith("python_version <") and sys.version_info >= (3, 11)):
            known.setdefault(name_of(line), version)
    found = {name: package.version.split("+")[0] for name in known if (package := installed(name))}
    return [f"{name:24} {version:>14} -> {found[name]}" for name, version in known.items() if found.get(name, version) != version] or [
        "no version differs from constraints.txt"]


if __name__ == "__main__":
    print(*{"constraints": constraints, "differences": differences}[sys.argv[1]](), sep="\n")
