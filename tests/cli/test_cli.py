import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moe_xe.cli import app
from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.plan.problem import Dtype
from tests import broken_drivers

ISA_FIELDS = {"kernel", "device", "dtype", "layout", "gathered", "grf", "spill_bytes", "slm_bytes", "dpas", "messages", "other",
              "other_per_dpas"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("n", [5760, 2880])
def test_schedule_of_the_recorded_layers(n):
    result = run("schedule", "--n", n, "--cores", 20, "--json")
    report = json.loads(result.output)
    assert report["efficiency"] >= 0.95 and len(report["layers"]) == 24
    assert "mean efficiency" in run("schedule", "--n", n).output


def test_schedule_of_own_rows(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[0, 40, 1000]")
    report = json.loads(run("schedule", "--rows", rows, "--n", 100, "--cores", 3, "--json").output)
    assert report["layers"][0]["useful"] == 1040 * 100


@pytest.mark.parametrize("text", ["", "{}", "[]", "[[1, -2]]", "[[1.5]]", "[[]]", '{"layers": 3}', "[[true]]"])
def test_rows_that_are_no_rows(tmp_path, text):
    rows = tmp_path / "rows.json"
    rows.write_text(text)
    result = run("schedule", "--rows", rows)
    unwrapped = "".join(c for c in result.output if c.isalnum() or c in "./_-")      # a long path is broken across lines
    assert result.exit_code == 2 and "rows.json" in unwrapped


def test_devices(monkeypatch):
    monkeypatch.setenv("MOE_XE_CPU_ISA", "baseline")
    found = json.loads(run("devices", "--json").output)
    assert [device["isa"] for device in found if device["kind"] == "cpu"] == ["baseline"]
    assert all((device["best_isa"] is None) == (device["kind"] == "gpu") for device in found)
    monkeypatch.setenv("MOE_XE_CPU_ISA", "sse")
    wrong = run("devices")
    assert wrong.exit_code == 2 and "MOE_XE_CPU_ISA must be one of" in wrong.output


def test_devices_says_which_platform_failed(tmp_path):
    done = subprocess.run([sys.executable, "-m", "moe_xe.cli", "devices", "--json"], capture_output=True, text=True,
                          env=broken_drivers.level_zero(tmp_path, "zeDeviceGetRootDevice"))
    assert done.returncode == 0 and [device["kind"] for device in json.loads(done.stdout)] == ["cpu"]
    failed, advice = done.stderr.splitlines()
    assert "(level_zero) failed: level_zero backend failed with error: 37" in failed and "moe-xe doctor" in advice


@pytest.mark.skipif(bool(spirv.missing() or ocloc.missing()), reason=spirv.missing() or ocloc.missing() or "-")
def test_isa(monkeypatch):
    """Of two variants, to compile less; tests/xe/test_codegen.py has all of them."""
    variants = kernels.variants
    cases = [*variants(5760, 2880, [Dtype.bf16])]
    assert {(case.weights.value, case.gathered) for case in cases} == {(layout, g) for layout in ("ekn", "enk") for g in (False, True)}
    monkeypatch.setattr(kernels, "variants", lambda *sizes: [case for case in variants(*sizes) if case.gathered == (case.weights.value == "enk")])
    reports = json.loads(run("isa", "--device", "bmg", "--n", 5760, "--k", 2880, "--json").stdout)
    assert [(r["layout"], r["gathered"]) for r in reports] == [("ekn", False), ("enk", True)]
    for r in reports:
        assert set(r) == ISA_FIELDS and r["spill_bytes"] == 0 and r["grf"] == 256
        assert r["other_per_dpas"] == pytest.approx((r["messages"] + r["other"]) / r["dpas"])


def test_isa_says_how_to_get_ocloc(monkeypatch):
    monkeypatch.setenv("MOE_XE_OCLOC", "/nowhere")
    result = run("isa")
    assert result.exit_code == 1 and "tools/install-ocloc" in result.output


@pytest.mark.parametrize("arguments", [("--dtype", "int8"), ("--n", 0)])
def test_isa_with_wrong_options(arguments):
    assert run("isa", *arguments).exit_code == 2


def test_bench_gemm_with_wrong_options():
    for arguments in (("--model", "gpt-9"), ("--tokens", "0"), ("--tokens", "many"), ("--dtype", "int8"), ("--weights", "nf4")):
        assert run("bench", "gemm", *arguments).exit_code == 2


@pytest.mark.few(1)
@pytest.mark.parametrize("weights", ["int4", "fp8"])
def test_bench_gemm_of_quantised_weights(weights, monkeypatch):
    from moe_xe.bench import workloads

    monkeypatch.setitem(workloads.MODELS, "tiny", workloads.Model("tiny", 48, 32, 6, 2))
    arguments = ("--model", "tiny", "--tokens", "3", "--dtype", "bf16", "--seconds", 0, "--weights", weights)
    first, _ = json.loads(run("bench", "gemm", *arguments, "--json").stdout)
    assert first["correct"] and first["weights"] == weights and first["moe_xe_dense_ms"] > 0


def test_bench_gemm(monkeypatch):
    from moe_xe.bench import workloads

    monkeypatch.setitem(workloads.MODELS, "tiny", workloads.Model("tiny", 48, 32, 6, 2))
    results = json.loads(run("bench", "gemm", "--model", "tiny", "--tokens", "1,7", "--dtype", "bf16", "--seconds", 0, "--json").stdout)
    assert [(r["n"], r["k"], r["tokens"]) for r in results] == [(64, 48, 1), (64, 48, 7), (48, 32, 1), (48, 32, 7)]
    assert all(r["correct"] and r["moe_xe_ms"] > 0 for r in results)
