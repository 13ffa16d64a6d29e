"""examples/ladder as a reader runs it."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

LADDER = Path(__file__).resolve().parents[2] / "examples" / "ladder"


def run(*arguments):
    return subprocess.run([sys.executable, LADDER / "run.py", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def run_here():
    """The same within this process, which has torch already."""
    app, threads = Typer(), torch.get_num_threads()
    app.command()(runpy.run_path(str(LADDER / "run.py"))["main"])
    yield lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
    torch.set_num_threads(threads)


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([0, 75, 1, 0, 14, 33, 3]))
    return path


def test_all_six_are_right(rows):
    done = run("--rows", rows, "--layer", 0, "--divide", 1, "--n", 96, "--k", 53, "--groups", 3, "--workers", 5, "--seconds", 0, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [r["step"] for r in results] == [1, 2, 3, 4, 5, 6] and all(r["verified"] for r in results)
    assert [r["launches"] for r in results] == [5, 1, 1, 1, 1, 1]
    tall, ragged = (96 + 32 + 32 + 64 + 32) / 126, (76 + 2 + 14 + 34 + 4) / 126
    assert [r["computed_rows"] for r in results] == pytest.approx([tall] * 2 + [ragged] * 4)
    assert results[2]["idle"] == pytest.approx(0.443, abs=1e-3) and results[3]["idle"] == pytest.approx(0.103, abs=1e-3)
    assert [r["copied_mb"] for r in results] == pytest.approx([126 * 4 * size / 1e6 for size in [53 + 192] * 4 + [192, 0]])


def test_the_table_fits_80_columns(rows, run_here):
    done = run_here("--rows", rows, "--layer", 0, "--n", 32, "--k", 8, "--seconds", 0)
    assert done.exit_code == 0 and "WRONG" not in done.stdout
    assert len(done.stdout.splitlines()) == 10 and max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [("--n", 40), ("--layer", 24), ("--divide", 0), ("--rows", "missing.json")])
def test_wrong_options(arguments, run_here):
    assert run_here(*arguments).exit_code == 2


def test_programs_are_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in LADDER.glob("*.cpp")}
    assert len(lines) == 6 and max(lines.values()) < 120, lines
