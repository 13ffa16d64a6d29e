"""moe-xe bench ep: its options, and what it prints."""
import json

import pytest
import torch
from typer.testing import CliRunner

from moe_xe.bench import expert_parallel
from moe_xe.bench.expert_parallel import Result
from moe_xe.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "ep", *(str(argument) for argument in arguments)])


@pytest.fixture
def measured(monkeypatch):
    """Call it with whether results are right; nothing is started."""
    def pretend(correct):
        def results(models, token_counts, options):
            ours, plain = ({part: factor * (1 + at) for at, part in enumerate(expert_parallel.PARTS)} for factor in (1.5, 6.0))
            return [Result(model, tokens, options, ours, plain, 1000 * tokens, 3000 * tokens, correct) for model in models for tokens in token_counts]

        monkeypatch.setattr(expert_parallel, "run", results)

    return pretend


@pytest.mark.parametrize("correct", [True, False])
def test_a_table(measured, correct):
    measured(correct)
    done = run("--model", "qwen3-30b-a3b,mixtral-8x7b", "--tokens", "5,700", "--ranks", 8, "--wire", "int8", "--delay", 0.5, "--chunks", 3)
    assert done.exit_code == (not correct) and ("NO" in done.output) is not correct
    for said in ("mixtral-8x7b, bf16, 8 ranks on cpu", "4.00", "chunks 3, rows as int8, back as bf16, a link of 0.5 ms for each MB", "2.100"):
        assert said in done.output


def test_an_object(measured):
    measured(True)
    first, second = json.loads(run("--tokens", "5,700", "--dtype", "fp32", "--json").stdout)
    assert (first["tokens"], second["plain_sent_bytes"], first["options"]["dtype"]) == (5, 2_100_000, "fp32")
    assert first["speedup"] == {"dispatch": 4.0, "combine": 4.0, "block": 4.0} and first["correct"]


def test_a_model_that_does_not_fit(measured, monkeypatch):
    measured(True)
    monkeypatch.setattr(expert_parallel, "available_bytes", lambda device: 10**9)
    done = run("--model", "deepseek-v3")
    assert done.exit_code == 1 and "deepseek-v3's experts need 22.5 GB at scale 1, and 1.0 GB are free on cpu" in done.output
    assert run("--model", "deepseek-v3", "--scale", 8).exit_code == 0


@pytest.mark.full
def test_processes():
    result, = json.loads(run("--ranks", 2, "--model", "mixtral-8x7b", "--scale", 64, "--tokens", 3, "--rounds", 1, "--json").stdout)
    assert result["correct"] and result["tokens"] == 3 and (result["plain_sent_bytes"] - 2 * 4 * 8) % (2 * 64 * 2) == 0     # counts, rows


@pytest.mark.parametrize("arguments, named", [
    (("--ranks", 1), "--ranks"), (("--ranks", 3), "--ranks"), (("--model", "gpt-9"), "--model"), (("--tokens", "0"), "--tokens"),
    (("--dtype", "int8"), "--dtype"), (("--wire", "int4"), "--wire"), (("--wire-back", "bf16"), "--wire-back"), (("--device", "cuda"), "--device"),
    (("--chunks", 0), "--chunks"), (("--delay", -1), "--delay"), (("--rounds", 0), "--rounds"), (("--scale", 0.5), "--scale"),
    pytest.param(("--device", "xpu"), "--device", marks=pytest.mark.skipif(torch.xpu.is_available(), reason="torch has an xpu here"))])
def test_wrong_options_are_named(arguments, named):
    done = run(*arguments)
    assert done.exit_code == 2 and named in done.output
