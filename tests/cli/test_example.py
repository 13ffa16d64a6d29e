"""examples/moe_gemm.py as a user runs it."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import moe_xe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "moe_gemm.py"


def run(*arguments):
    return subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same within this process, which has torch already: the exit status and the output."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return stop.value.code, capsys.readouterr().out

    return call


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([[0, 40, 3], [17, 0, 90]]))
    return path


@pytest.mark.full
@pytest.mark.parametrize("dtype, schedule", [("bf16", "dynamic"), pytest.param("fp32", "static", marks=pytest.mark.full)])
def test_own_rows(rows, dtype, schedule):
    done = run("--n", 72, "--k", 56, "--rows", rows, "--dtype", dtype, "--schedule", schedule, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [(r["layer"], r["n"], r["k"], r["rows"]) for r in results] == [(0, 144, 56, 43), (0, 56, 72, 43), (1, 144, 56, 107), (1, 56, 72, 107)]
    assert all(r["verified"] and r["roofline_ms"] > 0 and 0 < r["m_occupancy"] <= 1 for r in results)


def test_table_without_verification(rows, run_here):
    code, printed = run_here("--n", 32, "--k", 32, "--rows", rows, "--num_layers", 1, "--verify", 0, "--iterations", 1, "--schedule", "static")
    assert not code and "M-occ." in printed and "2 GEMMs" in printed


@pytest.mark.parametrize("arguments", [
    ("--num_layers", 3), *(pytest.param(arguments, marks=pytest.mark.full) for arguments in (("--n", 0), ("--verify", 2), ("--dtype", "int8")))])
def test_wrong_options(rows, arguments, run_here):
    assert run_here("--rows", rows, *arguments)[0] == 2


def test_failed_verification_fails(rows, monkeypatch, run_here):
    right = moe_xe.grouped_gemm

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[5, 7] += 1
        return out

    monkeypatch.setattr(moe_xe, "grouped_gemm", wrong)
    code, printed = run_here("--n", 32, "--k", 32, "--rows", rows, "--iterations", 1, "--schedule", "static")
    assert code == 1 and "FAILED" in printed
