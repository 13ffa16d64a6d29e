"""moe-xe bench block: options, what is printed, and the exit status."""
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from moe_xe import timing
from moe_xe.bench import block, block_models
from moe_xe.cli import app
from moe_xe.ops import tuned
from moe_xe.plan.model.devices import DeviceRecord
from moe_xe.plan.trials import trial_configs

pytest.importorskip("transformers", minversion="5.23")

RECORD = DeviceRecord("test", 2, {"bf16": 0.2, "f16": 0.1, "f32": 0.1}, 30.0, "made up")
SMALL = ("--scale", 64, "--seconds", 0, "--device", "cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A known roofline, times of single calls, and one trial where it tunes."""
    monkeypatch.setattr(block, "record_for", lambda device: RECORD)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)
    monkeypatch.setattr(tuned, "trial_configs", lambda *arguments: trial_configs(*arguments)[:1])


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "block", *map(str, arguments)])


@pytest.mark.parametrize("arguments, permute_x, permute_y", [
    pytest.param("--model qwen3 --mode forward --seqlen 24 --permute_x --permute_y --autotune", True, True, marks=pytest.mark.full),
    pytest.param("--model llama4 --autotune --mode=forward --permute-y --seqlen 8 --batch 3", False, True, marks=pytest.mark.full),
    ("--model mixtral --permute-x --tokens 24 --autotune", True, False)])
def test_the_founding_command_lines(arguments, permute_x, permute_y):
    result = run(*arguments.split(), *SMALL, "--json")
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)
    assert (case["tokens"], case["permute_x"], case["permute_y"], case["correct"]) == (24, permute_x, permute_y, True)
    assert case["moe_xe_ms"] > 0 and case["speedup"] > 0 and case["hidden_size"] % 64 == 0
    assert case["autotune"] == ("--autotune" in arguments)


@pytest.mark.parametrize("mode", [pytest.param("backward", marks=pytest.mark.full), "both"])
def test_training(mode):
    result = run("--model", "gpt-oss", "--mode", mode, "--tokens", 23, "--dtype", "fp32", "--permute_x", *SMALL, "--json")
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)
    assert (case["mode"], case["permute_x"], case["permute_y"], case["correct"]) == (mode, True, True, True)
    assert "always on in training" in result.stderr


def test_quantised_weights():
    result = run("--model", "gpt-oss", "--tokens", 5, "--weights", "dense,mxfp4", "--permute-x", "--permute-y", *SMALL)
    assert result.exit_code == 0, result.output
    assert "gpt-oss, bf16, mxfp4 weights, forward" in result.stdout and result.stdout.count("yes") == 2 and "dense" in result.stdout


@pytest.mark.parametrize("arguments, message", [(("--weights", "nf4"), "expected some of dense, mxfp4, int4, fp8, int8"),
                                                (("--weights", "int4", "--mode", "both"), "expected dense in training")])
def test_weights_that_there_are_not(arguments, message):
    result = run(*arguments, "--tokens", 3, *SMALL)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "times.png"
    result = run("--model", "mixtral", "--dtype", "bf16,fp32", "--tokens", "1,9", "--plot", path, *SMALL)
    assert result.exit_code == 0, result.output
    assert "mixtral at scale 64: hidden 64, intermediate 256, 8 experts, top 2" in result.stdout
    assert result.stdout.count("yes") == 4 and path.read_bytes().startswith(b"\x89PNG")


def test_wrong_outputs_fail_the_run(monkeypatch):
    fused = block_models.run_fused
    monkeypatch.setattr(block_models, "run_fused", lambda *arguments: fused(*arguments) + 1)
    result = run("--model", "mixtral", "--tokens", 3, *SMALL)
    assert result.exit_code == 1
    assert "NO" in result.stdout and "wrong output of mixtral bf16, dense weights, at 3 tokens: moe_xe" in result.stdout


@pytest.mark.parametrize("arguments, said", [
    (("--mode", "sideways"), "forward, backward, both"),
    (("--model", "gpt-9"), "gpt-9"), (("--dtype", "int8"), "int8"), (("--tokens", "1,0"), "1,0"), (("--tokens", "x"), "x"),
    (("--tokens", "1", "--seqlen", "8"), "--seqlen"), (("--scale", "0.5"), "--scale"), (("--seqlen", "0"), "--seqlen"),
    (("--device", "cuda"), "cuda"), (("--plot", "/no/such/place/a.png"), "/no/such/place")])
def test_wrong_options(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.output


@pytest.mark.skipif(torch.xpu.is_available(), reason="torch has an xpu here")
def test_no_xpu():
    result = run("--device", "xpu")
    assert result.exit_code == 2 and "xpu" in result.output


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(block, "available_bytes", lambda device: 4 << 30)
    result = run("--model", "qwen3,deepseek", "--device", "cpu")
    assert result.exit_code == 1 and "deepseek with 1024 tokens needs about" in result.stderr and result.stdout == ""


def test_missing_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--plot", tmp_path / "a.png", *SMALL)
    assert result.exit_code == 1 and "matplotlib" in result.stderr
