"""Dynamic instruction counts of the simulated kernels, after the tests, whichever worker ran them."""
import pytest

from . import case


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["simulated"] = case.REPORT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    case.REPORT += getattr(node, "workeroutput", {}).get("simulated", [])


def pytest_terminal_summary(terminalreporter):
    if case.REPORT:
        terminalreporter.section("simulated on bmg: instructions of the last launch of each test")
        for line in case.REPORT:
            terminalreporter.write_line(line)
