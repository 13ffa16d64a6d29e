"""Dynamic instruction counts of the simulated kernels, after the tests."""
from . import case


def pytest_terminal_summary(terminalreporter):
    if case.REPORT:
        terminalreporter.section("simulated on bmg: instructions of the last launch of each test")
        for line in case.REPORT:
            terminalreporter.write_line(line)
