"""moe-xe tune: what is run, what is printed, and what the next process finds."""
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moe_xe import timing
from moe_xe.bench import block, block_models
from moe_xe.cli import app
from moe_xe.device import facts_of, queue_for
from moe_xe.ops import tuned
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem
from moe_xe.tuning import default_store, default_tuner, tuning_key

CPU = torch.device("cpu")
PROBLEM = GroupedGemmProblem(128, 64, Dtype.bf16, Dtype.bf16)
DEFAULT = cpu_config(PROBLEM, "baseline")
OTHER = replace(DEFAULT, tile_width=128, raster_group=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Empty, and times of single calls."""
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    default_tuner.cache_clear()
    yield
    default_tuner.cache_clear()


def run(*arguments):
    return CliRunner().invoke(app, ["tune", "--device", "cpu", "--seconds", "0", *map(str, arguments)])


@pytest.fixture
def calls(monkeypatch):
    """Puts a block in place that has one GEMM to tune, and says what it was called with."""
    found = []

    def run_fused(family, weights, inputs, fusions, autotune):
        tokens = len(inputs.hidden_states)
        found.append((family.model.name, tokens, inputs.hidden_states.dtype, weights.w13.requires_grad, autotune))
        key = tuning_key(facts_of(queue_for(CPU)), "grouped_gemm", PROBLEM, family.model.num_experts, tokens, "unread", DEFAULT)
        default_tuner().config_for(key, DEFAULT, lambda: [OTHER], lambda config: sum(range(1000)), CPU, False)
        return inputs.hidden_states * 2

    monkeypatch.setattr(block_models, "run_fused", run_fused)
    return found


def test_every_case_is_run_once_and_its_choices_are_listed(calls):
    result = run("--model", "mixtral,gpt-oss", "--tokens", "1,7", "--dtype", "bf16,fp32", "--scale", 64, "--json")
    assert result.exit_code == 0, result.output
    assert calls == [(name, tokens, dtype, False, True) for name in ("mixtral-8x7b", "gpt-oss-20b")
                     for dtype in (torch.bfloat16, torch.float32) for tokens in (1, 7)]
    choices = json.loads(result.stdout)
    assert [(each["model"], each["dtype"], each["tokens"]) for each in choices] == [
        (name, "bf16", tokens) for name in ("mixtral", "gpt-oss") for tokens in (1, 7)]     # fp32 is the same problem here
    stored = {json.dumps(key.facts(), sort_keys=True): entry.as_dict() for key, entry in default_store().entries()}
    assert {json.dumps(each["key"], sort_keys=True): each["entry"] for each in choices} == stored
    assert default_tuner().seconds == 0


def test_table(calls):
    result = run("--model", "mixtral", "--tokens", "5", "--scale", 64)
    assert result.exit_code == 0 and "chosen on cpu: mixtral, bf16" in result.stdout
    (line,) = (line for line in result.stdout.splitlines() if "gemm 128x64" in line)
    assert line.split()[0] == "5" and "168x192" in result.stdout


def test_what_is_known_is_listed_but_not_measured_again(calls, monkeypatch):
    arguments = ("--model", "mixtral", "--tokens", "5", "--scale", 64, "--json")
    first = json.loads(run(*arguments).stdout)
    default_tuner.cache_clear()
    monkeypatch.setattr("moe_xe.tuning.tuner.timed", None)
    assert json.loads(run(*arguments).stdout) == first and len(first) == 1


def test_training(calls):
    result = run("--model", "mixtral", "--tokens", "3", "--scale", 64, "--training")
    assert result.exit_code == 0, result.output
    assert calls == [("mixtral-8x7b", 3, torch.bfloat16, True, True)]


@pytest.mark.parametrize("arguments, said", [
    (("--model", "gpt-9"), "gpt-9"), (("--dtype", "int8"), "int8"), (("--tokens", "1,0"), "1,0"), (("--scale", "0.5"), "--scale"),
    (("--seconds", "-1"), "--seconds"), (("--device", "cuda"), "cuda")])
def test_wrong_options(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.output


def test_failures(monkeypatch):
    monkeypatch.setattr(block, "available_bytes", lambda device: 4 << 30)
    result = run("--model", "qwen3,deepseek")
    assert result.exit_code == 1 and "deepseek with 1024 tokens needs about" in result.stderr and result.stdout == ""
    default_tuner.cache_clear()
    monkeypatch.setenv("MOE_XE_TUNE_SECONDS", "long")
    result = run("--model", "mixtral", "--scale", 64)
    assert result.exit_code == 1 and "MOE_XE_TUNE_SECONDS" in result.stderr


@pytest.mark.few(1)
@pytest.mark.parametrize("training", [False, True])
def test_the_next_process_hits(monkeypatch, training):
    """With the block itself, whose GEMMs and, in training, their gradients are tuned; no candidates, to compile less."""
    monkeypatch.setattr(tuned, "trial_configs", lambda *arguments: [])
    arguments = ("--model", "mixtral", "--tokens", 3, "--dtype", "fp32", "--scale", 64, "--json", *["--training"] * training)
    torch.manual_seed(0)    # the same routing, so the same skew
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    choices = json.loads(result.stdout)
    ops = [choice["key"]["op"] for choice in choices]
    assert (ops.count("grouped_gemm"), ops.count("grouped_outer")) == ((5, 2) if training else (2, 0))    # one is computed again
    default_tuner.cache_clear()    # as another process starts
    torch.manual_seed(0)
    monkeypatch.setattr("moe_xe.tuning.tuner.timed", None)
    assert json.loads(run(*arguments).stdout) == choices


def test_quantised_weights(calls, monkeypatch):
    codes = []
    counted = block_models.run_fused

    def run_fused(family, weights, *arguments, **options):
        codes.append(weights.w13)
        return counted(family, replace(weights, w13=torch.empty(0)), *arguments, **options)

    monkeypatch.setattr(block_models, "run_fused", run_fused)
    result = run("--model", "mixtral", "--tokens", 1, "--scale", 64, "--weights", "mxfp4,dense")
    assert result.exit_code == 0 and "mixtral, bf16, mxfp4 weights" in result.stdout, result.output
    assert [getattr(w, "format", "dense") for w in codes] == ["mxfp4", "dense"]
    assert run("--weights", "mxfp4", "--training").exit_code == 2
