"""examples/train_quantised_lora.py: what it trains and compares, its options, and what it prints."""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from moe_xe import QuantizedWeight
from moe_xe.nn import lora

pytest.importorskip("transformers", minversion="5.23")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_quantised_lora.py"
SMALL = ("--batch", 4, "--seqlen", 32, "--hidden-size", 32, "--experts", 4, "--rank", 4, "--base-steps", 40)


@pytest.fixture
def run():
    app = Typer()
    app.command()(runpy.run_path(str(EXAMPLE))["main"])
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.full
@pytest.mark.parametrize("format, bits", [("mxfp4", 4 + 8 / 32), ("int4", 4 + 32 / 32), ("fp8", 8 + 32 / 32**2)])
def test_adapters_learn_as_on_dense_experts(run, format, bits):
    done = run(*SMALL, "--format", format, "--steps", 25, "--seed", 3, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["format"], result["agrees"]) == (format, True)
    weights = 2 * 4 * 3 * 32 * 32
    for name, size in (("quantised", weights * bits / 8), ("dequantised", weights * 2), ("dense", weights * 2)):
        losses = result[name]["loss"]
        assert len(losses) == 25 and sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1
        assert result[name]["experts_bytes"] == size and result[name]["peak_bytes"] > 0
    first, most = result["dequantised"]["differences"]
    assert first <= most < 1e-3 and 0 < result["dense"]["differences"][1] < result["dense"]["limits"][1]


def test_losses_that_differ_fail(run, monkeypatch):
    """Here: quantised experts that are four times as large, of a base that has learnt nothing."""
    right = lora.lora_moe
    monkeypatch.setattr(lora, "lora_moe", lambda x, w13, *args, **options: right(x, w13, *args, **options) * (
        4 if isinstance(w13, QuantizedWeight) else 1))
    done = run(*SMALL, "--base-steps", 0, "--steps", 2)
    assert done.exit_code == 1 and "DO NOT AGREE" in done.output and "mxfp4" in done.output


@pytest.mark.parametrize("arguments, said", [
    (("--hidden-size", 48), "must be a multiple of 32, got 48"), (("--format", "int3"), "int3"), (("--steps", 0), "--steps"),
    (("--experts", 1), "--experts"), (("--dtype", "int8"), "int8"),
    pytest.param(("--device", "xpu"), "no xpu", marks=pytest.mark.skipif(torch.xpu.is_available(), reason="torch has an xpu here"))])
def test_wrong_options(run, arguments, said):
    done = run(*arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


def test_missing_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = run(*SMALL)
    assert done.exit_code == 1 and "needs transformers" in done.output
