"""The whole report, section by section: each is a title, rows of (label, text), and the facts for programs."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from ..disk_cache import DIRECTORY_VARIABLE
from . import environment, separately

OLDEST_LOADER = (1, 21, 2)      # what the runtime's Level Zero adapter asks for; with 1.8 it fails
_SELECTOR, _LOG = "ONEAPI_DEVICE_SELECTOR", "UR_LOG_LEVEL_ZERO"
_BACKENDS = ("level_zero", "opencl")


@dataclass(frozen=True)
class Section:
    """facts: the same in values for JSON; None where the rows are all there is."""
    title: str
    rows: list[tuple[str, str]]
    facts: object = None
    computed: bool = False      # whether it shows a device that computes right


def sections(seconds: float) -> Iterator[Section]:
    """One after the other, so that what comes late does not keep what is known. seconds: the limit of each program that is run."""
    for title, read in (("system", environment.system), ("versions", environment.versions), ("environment", environment.variables),
                        ("cache", environment.cache)):
        yield Section(title, list(read().items()))
    yield _loader(seconds)
    # as the user has it; the adapter's warnings say why it skips a loader, a driver or a card
    log = {} if _LOG in os.environ else {_LOG: "level:warning;output:stderr"}
    found = separately.run("platforms", seconds=seconds, **log)
    yield Section("platforms", _platform_rows(found), found)
    if "error" in found:
        for backend in _BACKENDS:
            alone = separately.run("platforms", seconds=seconds, **log, **{_SELECTOR: f"{backend}:*"})
            yield Section(f"platforms with {_SELECTOR}={backend}:*", _platform_rows(alone), alone)
            yield from _gemms(alone, seconds, {_SELECTOR: f"{backend}:*"})
    yield from _gemms(found, seconds, {})


def _loader(seconds: float) -> Section:
    found = separately.run("loader", seconds=seconds)
    rows = [(label, found[label]) for label in ("path", "version") if label in found]
    if "error" in found:
        rows.append(("error", found["error"]))
        rows.append(("advice", "only a GPU needs it: libze1, which comes with Intel's GPU driver"))
    elif _is_old(found["version"]):
        rows.append(("advice", f"older than {'.'.join(map(str, OLDEST_LOADER))}: install a newer libze1 (level-zero)"))
    return Section("Level Zero loader", rows + _said(found), found)


def _is_old(version: str) -> bool:
    numbers = version.split(".")
    return all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < OLDEST_LOADER


def _platform_rows(found: dict) -> list[tuple[str, str]]:
    rows = [("error", found["error"])] if "error" in found else []
    for platform in found.get("platforms", ()):
        rows.append((platform["backend"], platform["name"]))
        rows += [(f"- {device['kind']}", f"{device['name']}, driver {device['driver']}, {device['architecture']}") for device in platform["devices"]]
        rows += [("- error", error) for error in platform["errors"]]
    if not rows:
        rows.append(("none", "SYCL finds no device"))
    if "torch_xpu" in found:
        rows.append(("torch", f"{found['torch_xpu']} XPU devices"))
    return rows + _said(found)


def _said(found: dict) -> list[tuple[str, str]]:
    return [("said", line) for line in found.get("said", ())]


def _gemms(found: dict, seconds: float, variables: dict[str, str]) -> Iterator[Section]:
    for index, device in enumerate(found.get("devices", ())):
        with tempfile.TemporaryDirectory(prefix="moe_xe-doctor-") as empty:     # so that the first call compiles
            result = separately.run("gemm", str(index), seconds=seconds, **variables, **{DIRECTORY_VARIABLE: empty})
        yield Section(f"grouped GEMM on {device['name']}", _gemm_rows(result), {"device": device, **result}, result.get("correct") is True)


def _gemm_rows(result: dict) -> list[tuple[str, str]]:
    if "error" in result:
        return [("FAILED", result["error"]), *_said(result)]
    if "not_run" in result:
        return [("not run", result["not_run"]), *_said(result)]
    return [("right" if result["correct"] else "WRONG", f"largest error {result['max_error']:.2g} of the RMS, calc_diff {result['calc_diff']:.2g}"),
            ("memory", result["memory"]), ("first call", f"{result['first_ms']:.0f} ms, with the compilation"), ("later call", f"{result['later_ms']:.3f} ms"),
            *_said(result)]
