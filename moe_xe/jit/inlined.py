"""The device headers as text, so that one kernel can have them for several problems."""
from __future__ import annotations

import functools
import re

from .shipped_sources import sources_dir

_INCLUDE = re.compile(r"#include <(moe_xe/\S+)>")
_BRANCH = re.compile(r"#(?:el)?if defined\(MOE_XE_(\w+)\)")


def inlined(header: str, family: str, seen: set[str]) -> str:
    """A header of include/ and those that it includes, each once; `seen` ones are left out, and new ones are added to it.

    family: as for `assemble`. Its branches alone remain, since an include in another one must not count as seen.
    """
    if header in seen:
        return ""
    seen.add(header)
    lines, taken = [], [True]      # of each open #if: whether its current branch is the one that remains
    done = [True]                  # whether one of its branches was
    for line in _text(header).splitlines():
        if branch := _BRANCH.fullmatch(line):
            if line.startswith("#if"):
                taken.append(False)
                done.append(False)
            taken[-1] = not done[-1] and branch[1] == family
            done[-1] |= taken[-1]
        elif line == "#else":
            taken[-1] = not done[-1]
        elif line == "#endif":
            taken.pop()
            done.pop()
        elif all(taken) and line != "#pragma once":
            include = _INCLUDE.fullmatch(line)
            lines.append(inlined(include[1], family, seen) if include else line)
    return "\n".join(lines)


@functools.cache
def _text(header: str) -> str:
    return (sources_dir() / "include" / header).read_text()


def renamed(namespace: str, family: str, problem: list[str], config: list[str], headers: list[str]) -> str:
    """The headers with these constants (as for `assemble`), in `namespace` where they say moe_xe."""
    seen: set[str] = set()
    return "\n".join([
        f"#define moe_xe {namespace}",
        inlined("moe_xe/types.hpp", family, seen),
        "namespace moe_xe::problem {", *problem, "}",
        "namespace moe_xe::config {", *config, "}",
        *(inlined(header, family, seen) for header in headers),
        "#undef moe_xe", ""])
