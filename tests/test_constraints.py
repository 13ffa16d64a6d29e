"""constraints.txt and build-constraints.txt name one version of all that pip installs."""
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def versions(file: str, python: str) -> dict[str, str]:
    """Of each package that the file names for a Python."""
    found = {}
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (specifier,) = requirement.specifier
            name = canonicalize_name(requirement.name)
            assert specifier.operator == "==" and "*" not in specifier.version and "+" not in specifier.version and name not in found, line
            found[name] = specifier.version
    return found


def wanted(*extras: str) -> dict[str, Requirement]:
    """What moe_xe and, in turn, its requirements ask for, but for what torch pins itself."""
    found, new = {}, [("moe_xe", extras)]
    while new:
        name, extras = new.pop()
        try:
            texts = requires(name) or ()
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            name_of_it = canonicalize_name(requirement.name)
            pinned = name == "torch" and any(s.operator == "==" for s in requirement.specifier)
            if name_of_it not in found and not pinned and any(
                    requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                found[name_of_it] = requirement
                new.append((name_of_it, tuple(requirement.extras)))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_one_version_of_each(python):
    assert len(versions("constraints.txt", python)) > 50 and "moe-xe" not in versions("constraints.txt", python)


def test_all_that_is_installed_is_named():
    known = versions("constraints.txt", f"{sys.version_info.major}.{sys.version_info.minor}")
    asked = wanted("cpu", "test", "bench")
    assert not asked.keys() - known.keys() and {"torch", "transformers", "dpctl", "pytest", "matplotlib"} <= asked.keys()
    assert all(requirement.specifier.contains(known[name]) for name, requirement in asked.items())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_build():
    import tomllib

    requirements = [*map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])]
    for python in PYTHONS:
        known = versions("build-constraints.txt", python)
        assert all(r.specifier.contains(known[canonicalize_name(r.name)]) for r in requirements)
