"""Every table in a terminal of 80 columns: nothing is cut, folded or wider."""
import json
import os
import pty
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from moe_xe.bench.block import Result
from moe_xe.cli import app, bench, choices, isa, tables
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Dtype, GroupedGemmProblem
from moe_xe.runtime import devices
from moe_xe.tuning import Entry, tuning_key

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GEMM = SimpleNamespace(model="mixtral-8x7b", n=28672, k=4096, tokens=16384, weights="dense", moe_xe_ms=13167.654, moe_xe_dense_ms=13167.654, grouped_mm_ms=23167.654, mm_loop_ms=23167.6,
                       speedup=14.36, gflops=123456, gbytes_per_s=123.4, correct=False)
BLOCK = Result(model="deepseek", weights="dense", mode="backward", device="cpu", dtype="bf16", hidden_size=7168, intermediate_size=2048, shared_intermediate_size=2048,
               num_experts=256, top_k=8, tokens=16384, rows=131072, active_experts=256, permute_x=True, permute_y=True, autotune=True,
               moe_xe_ms=12345.678, moe_xe_dense_ms=None, eager_ms=23456.789, grouped_mm_ms=None, batched_mm_ms=3456.7891, not_run={}, fastest_peer="eager", speedup=12.34,
               gflops=98765.4, gbytes_per_s=123.4, roofline=1.23, moe_xe_peak_bytes=12_345_600_000, fastest_peer_peak_bytes=23_456_700_000, wrong=[])
LISTING = {"kernel": "grouped_gemm", "device": "ptl-h", "dtype": "bf16", "layout": "ekn", "gathered": False, "grf": 256, "spill_bytes": 12345,
           "slm_bytes": 131072, "dpas": 1024, "messages": 1024, "other": 12345, "other_per_dpas": 12.34}


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")      # rich takes any file for a terminal


def lines(output: str) -> list[str]:
    shown = Text.from_ansi(output).plain.splitlines()
    assert shown and max(map(len, shown)) <= 80 and "…" not in output, output
    return shown


def run(*arguments) -> list[str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return lines(result.stdout)


def row_with(shown: list[str], *cells: str) -> None:
    assert sum(all(cell in line.split() for cell in cells) for line in shown) == 1, "\n".join(shown)


def test_bench_gemm(capsys):
    cases = [SimpleNamespace(**{**vars(GEMM), "dtype": dtype, "weights": weights}) for dtype, weights in (
        ("bf16", "dense"), ("fp32", "dense"), ("bf16", "mxfp4"))]
    bench._print_gemms(cases)
    shown = lines(capsys.readouterr().out)
    assert sum("mixtral-8x7b 28672 x 4096" in " ".join(line.split()) and "13168" in line and "NO" in line for line in shown) == 3


def test_bench_block(capsys):
    bench._print_blocks([BLOCK, replace(BLOCK, dtype="fp32", tokens=1), replace(BLOCK, weights="mxfp4", tokens=8192, moe_xe_dense_ms=34567.8)], 64)
    shown = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    lines("\n".join(line for line in shown if not line.startswith(("fused: ", "deepseek at "))))     # sentences are the terminal's to fold
    row_with(shown, "16384", "12346", "23457", "-", "3457", "12.34", "98765", "123.4", "123%", "yes")
    row_with(shown, "8192", "12346", "34568", "23457", "-", "3457")


def test_isa(capsys):
    isa._print([LISTING], 28672, 14336)
    row_with(lines(capsys.readouterr().out), "ptl-h", "131072", "12.34")


def test_choices(capsys):
    problem = GroupedGemmProblem(28672, 14336, Dtype.bf16, Dtype.bf16)
    default = XeConfig((256, 128, 64, 32, 16), 256, raster_group=1, min_fill_eighths=7, schedule=Schedule.dynamic, sub_group_rows=(32, 32, 16, 16, 16), sub_group_columns=(64, 32, 32, 16, 16), prefetch_distance=3)
    chosen = replace(default, sub_group_columns=(32, 32, 32, 16, 16), prefetch_distance=4)
    (cpu, *_) = devices()
    key = tuning_key(cpu, "grouped_gemm", problem, 256, 100000, "unread", default)
    entry = Entry(chosen, default, {default: 123456.0, chosen: 23456.0})
    table = choices.choices_table("measured choices: Intel(R) Arc(TM) B580 Graphics", "tokens", last=("here",))
    table.add_row("16384", *choices.choice_row(key, entry), "yes")
    tables.print_table(table)
    shown = lines(capsys.readouterr().out)
    row_with(shown, "16384", "28672x14336,", "256", "unread", "123456", "23456", "yes")
    assert any("sub_group_columns 32/32/32/16/16" in line for line in shown) and any("256/128/64/32/16x256" in line for line in shown)


@pytest.mark.parametrize("arguments", [("devices",), ("predict", "--model", "mixtral", "--tokens", "1,64,16384"), ("predict", "--check"),
                                       ("schedule", "--cores", "20", "--n", "2880")], ids=" ".join)
def test_commands(arguments):
    run(*arguments)


def test_schedule_of_every_height(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([[100000, 1, 17, 33, 70, 130, 300], [1], [1000] * 100]))
    shown = run("schedule", "--rows", rows, "--cores", 160)
    row_with(shown, "0", "100551")


def test_examples(capsys):
    gemm = {"layer": 23, "rows": 131072, "n": 28672, "k": 14336, "ms": 13167.654, "gflops": 123456.0, "gbytes_per_s": 1234.5, "m_occupancy": 0.97,
            "roofline_ms": None, "verified": True}
    runpy.run_path(str(EXAMPLES / "moe_gemm.py"))["show"]([gemm], Console(highlight=False))
    row_with(lines(capsys.readouterr().out), "23", "131072", "28672", "13168", "unknown", "passed")
    way = {"loss": [5.6789, 1.2345], "step_tokens_per_s": 1234567.8, "experts_tokens_per_s": 2345678.9}
    runpy.run_path(str(EXAMPLES / "train_tiny_moe.py"))["show"](
        {"moe_xe": way, "eager": way, "agrees": True, "first_difference": 1e-6, "max_difference": 1e-3, "mean_difference": 1e-4, "steps": 2}, Console())
    assert "1234568" in capsys.readouterr().out
    trained = {"loss": [5.6789, 1.2345], "differences": [1e-12, 2.1e-2], "limits": [1e-4, 0.07], "experts_bytes": 1234567890, "peak_bytes": 12345678900}
    runpy.run_path(str(EXAMPLES / "train_quantised_lora.py"))["show"](
        {"format": "mxfp4", "quantised": trained, "dequantised": trained, "dense": trained, "agrees": True}, Console(highlight=False))
    row_with(lines(capsys.readouterr().out), "dequantised", "5.6789", "1.2345", "(0.0001)", "(0.07)", "1234.568", "12345.7")


def test_a_cell_is_never_cut(capsys):
    """Beyond a terminal that is too narrow for it."""
    table = tables.new_table("a", "b", title="numbers")
    table.add_row("1" * 60, "2" * 60)
    tables.print_table(table)
    shown = Text.from_ansi(capsys.readouterr().out).plain
    assert "1" * 60 + " " + "2" * 60 in shown and "…" not in shown


@pytest.mark.parametrize("value, text", [(None, "-"), (0.0012, "0.001"), (1.23456, "1.235"), (9.9996, "10.00"), (99.996, "100.0"), (999.96, "1000"),
                                         (12345.6, "12346")])
def test_short_numbers(value, text):
    assert tables.short(value) == text


@pytest.mark.parametrize("command, shown", [("schedule", "occupancy"), pytest.param("doctor", "later call", marks=pytest.mark.full)])
def test_a_real_terminal(command, shown):
    """Standard output of a process is a pty; rich asks it for its width."""
    main, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-m", "moe_xe.cli", command], stdout=terminal, env=environment)
    os.close(terminal)
    output = b""
    try:
        while part := os.read(main, 4096):
            output += part
    except OSError:     # what Linux raises at the end
        pass
    os.close(main)
    assert process.wait() == 0 and any(shown in line for line in lines(output.decode().replace("\r", "")))
