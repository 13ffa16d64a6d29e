"""The root conftest.py: which points of a grid run, what is left for --rest, and what is said of tests that no time was left for."""
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
covering_sample = runpy.run_path(str(CONFTEST))["covering_sample"]

TESTS = """
import ctypes
import os
import pytest

@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b, c", [(1, 1), (2, 1)])
@pytest.mark.parametrize("d", "xy")
def test_grid(a, b, c, d):
    pass

@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_list(case):
    pass

@pytest.mark.few(2)
@pytest.mark.parametrize("case", range(5))
def test_few(case):
    pass

@pytest.mark.full
def test_full():
    assert os.environ["OMP_NUM_THREADS"]

def test_crash():
    if "CRASH" in os.environ:
        ctypes.string_at(0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs TESTS with these options; returns the exit status, the ids that passed, and the output."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")       # the other plugins take a second to import
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n full: in all\n few(n): so many")

    def run(*options):
        done = subprocess.run([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "xdist", *options], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, sorted(set(re.findall(r"::(\S+) PASSED|PASSED \S+::(\S+)", done.stdout))), done.stdout

    return run


@pytest.mark.parametrize("sizes", [(4, 3), (5, 2), (3, 2, 4), (3, 3, 2, 2), (2, 2, 2)])
def test_a_sample_covers(sizes):
    points = [*itertools.product(*map(range, sizes))]
    kept = [points[index] for index in covering_sample(points)]
    assert len(kept) == max(sizes) and kept == sorted(set(kept))
    assert [set(values) for values in zip(*kept)] == [set(range(size)) for size in sizes]


def test_sample_and_rest_are_the_whole(run):
    status, sample, said = run()
    assert status == 0 and len(sample) == 3 + 2 + 2 + 1 and "14 deselected" in said
    assert {"test_few[0]", "test_few[4]"} <= {name for names in sample for name in names}
    status, rest, _ = run("--rest")
    assert status == 0 and not set(sample) & set(rest)
    assert run("--full")[1] == sorted(sample + rest) and len(sample + rest) == 12 + 3 + 5 + 1 + 1
    assert len(run("test_it.py::test_grid")[1]) == 12


def test_no_time(run):
    status, passed, said = run("--seconds", "0")
    assert (status, passed) == (0, []) and "8 tests were not run, for lack of time" in said and "8 of test_it.py" in said
    assert re.search(r"= 14 deselected, 8 not run in ", said), said


def test_workers_end_with_the_run(run):
    status, passed, said = run("-n", "2", "--seconds", "600")
    assert (status, len(passed)) == (0, 8) and "not run" not in said
    status, passed, said = run("-n", "2", "--seconds", "0")
    assert (status, passed) == (0, []) and "8 not run in " in said


def test_a_crash_is_one_failure(run, monkeypatch):
    monkeypatch.setenv("CRASH", "1")
    status, passed, said = run("-n", "2", "--dist", "worksteal")
    assert status == 1 and len(passed) == 7 and "1 failed, 7 passed" in said
