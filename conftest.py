"""Which tests run: a sample of every grid of cases by default, all with --full, what the sample leaves out with --rest; and until when.

A grid is a test with several `parametrize` decorators or parametrised fixtures: each is an axis, and the sample has every value of each.
One list of cases is no grid and runs whole. What in it repeats another case at some cost, and a test of that kind, is marked `full`; of a
test that is marked `few(n)`, n cases of the sample run. Hypothesis tries few examples where each compiles kernels, which is the profile
"compiling". --device puts a simulated card before the tests (docs/simulated-gpu.md).
"""
from __future__ import annotations

import os
import time
from collections import Counter, defaultdict

import hypothesis
import pytest

# The workers share the cores. Threads of OpenMP wait for each other by spinning: two for each of two workers take ten times as long as one.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

_NO_TIME = "no time was left"

# What --device runs, but for tests marked cpu_device.
_ON_A_CARD = ("tests/ops/", "tests/nn/", "tests/grouped_gemm/", "tests/integrations/", "tests/runtime/")


def pytest_addoption(parser):
    group = parser.getgroup("moe_xe")
    group.addoption("--full", action="store_true", help="all points of every grid of cases")
    group.addoption("--rest", action="store_true", help="only those that are left out by default")
    group.addoption("--device", choices=["simulated", "simulated-xpu"],
                    help="run the tests of ops, blocks and runtime on a simulated Arc B580: with CPU tensors, or as torch's xpu")
    group.addoption("--seconds", type=float, help="begin no test later than this; the others are listed as not run")


def covering_sample(points: list[tuple]) -> list[int]:
    """Which points to keep so that every value of each axis occurs in them. Greedy, the first of equals."""
    values = [set(enumerate(point)) for point in points]
    uncovered, kept = set().union(*values), []
    while uncovered:
        best = max(range(len(points)), key=lambda index: len(values[index] & uncovered))
        kept.append(best)
        uncovered -= values[best]
    return sorted(kept)


def spread(cases: list, number: int) -> list:
    """So many of them, with the first and the last."""
    if number == 1:
        return cases[:1]
    return [cases[round(index * (len(cases) - 1) / (number - 1))] for index in range(number)] if number < len(cases) else cases


def _axes(item) -> tuple:
    """The item's value of each axis of its grid. Values that decorators list together are one; equal means the same object."""
    values = {name: id(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    names = [[name.strip() for name in group.split(",")] if isinstance(group, str) else group for group in names]
    together = [tuple(values.pop(name) for name in group) for group in names]
    return (*together, *((values[name],) for name in sorted(values)))


def _sampled(items: list) -> set:
    grids = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("full"):
            grids[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for grid in grids.values():
        axes = [values for values in zip(*map(_axes, grid)) if len(set(values)) > 1]
        sample = grid if len(axes) < 2 else [grid[index] for index in covering_sample(list(zip(*axes)))]
        few = grid[0].get_closest_marker("few")
        kept.update(sample if few is None else spread(sample, *few.args))
    return kept


@pytest.hookimpl(trylast=True)      # after -m and -k
def pytest_collection_modifyitems(config, items):
    if config.option.device is not None:
        _keep(config, items, [item for item in items if _runs_on_a_card(item, config)])
    if config.option.full and not config.option.rest or any("::" in argument for argument in config.args):
        return      # who names a test wants all of it
    sample = _sampled(items)
    _keep(config, items, [item for item in items if (item in sample) != config.option.rest])


def _keep(config, items: list, kept: list) -> None:
    left_out = set(items) - set(kept)
    items[:] = kept
    config.hook.pytest_deselected(items=list(left_out))


def _runs_on_a_card(item, config) -> bool:
    if not item.nodeid.startswith(_ON_A_CARD) or item.get_closest_marker("cpu_device"):
        return False
    return config.option.device == "simulated" or "device" in item.fixturenames      # others make CPU tensors


def _put_card_before_the_process(torch_has_it: bool) -> None:
    """torch_has_it: as its xpu; else CPU tensors stand for USM, as the card may use all memory of the process."""
    import zesim
    from moe_xe import device
    from moe_xe.runtime import Queue

    if reason := zesim.missing_tools():
        raise pytest.UsageError(f"no simulated device: {reason}")
    os.environ.update(zesim.environment(system_memory=not torch_has_it))       # nothing has used SYCL yet
    if torch_has_it:
        from tests.xpu import fake

        fake.install()
    else:
        device._cpu_queue = device.once(lambda: Queue.create("gpu"))


def pytest_configure(config):
    if config.option.device is not None:
        _put_card_before_the_process(torch_has_it=config.option.device == "simulated-xpu")
    hypothesis.settings.register_profile("compiling", max_examples=12 if config.option.full else 2, deadline=None)
    config.ends = None if config.option.seconds is None else time.time() + config.option.seconds
    if hasattr(config, "workerinput"):
        config.ends = config.workerinput["ends"]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """All workers end when the run does, whenever they begin."""
    node.workerinput["ends"] = node.config.ends


def pytest_runtest_protocol(item, nextitem):
    ends = item.config.ends
    if ends is None or time.time() < ends:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    report = pytest.TestReport(item.nodeid, item.location, {}, "skipped", (str(item.path), item.location[1] or 0, _NO_TIME), "call")
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if nextitem is None or nextitem.path != item.path:
        item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_report_teststatus(report):
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[2] == _NO_TIME:
        return "not run", "-", "NOT RUN"


def pytest_terminal_summary(terminalreporter):
    files = Counter(report.nodeid.partition("::")[0] for report in terminalreporter.stats.get("not run", []))
    if files:
        terminalreporter.section(f"{sum(files.values())} tests were not run, for lack of time")
        for file, count in sorted(files.items()):
            terminalreporter.write_line(f"{count:5d} of {file}")
