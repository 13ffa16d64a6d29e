"""examples/train_tiny_moe.py: what it trains, checkpoints, options, and what it prints."""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from moe_xe.integrations import transformers as integration

pytest.importorskip("transformers", minversion="5.23")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_tiny_moe.py"
SMALL = ("--batch", 2, "--seqlen", 24, "--hidden-size", 32, "--experts", 6, "--top-k", 2)


@pytest.fixture
def example():
    """The program's names."""
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def run(example):
    app = Typer()
    app.command()(example["main"])
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def losses(done) -> dict[str, list[float]]:
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    return {way: result[way]["loss"] for way in ("moe_xe", "eager")}


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_both_learn_the_same(run, dtype):
    done = run(*SMALL, "--steps", 25, "--dtype", dtype, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["steps"], result["dtype"], result["agrees"]) == (25, dtype, True)
    assert result["first_difference"] <= result["max_difference"]
    for way in ("moe_xe", "eager"):
        assert len(result[way]["loss"]) == 25 and result[way]["loss"][-1] < result[way]["loss"][0] - 0.3
        assert result[way]["experts_tokens_per_s"] > result[way]["step_tokens_per_s"] > 0


def test_table_and_plot(run, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(*SMALL, "--steps", 2, "--plot", tmp_path / "losses.png")
    assert done.exit_code == 0, done.output
    assert "the loss curves agree" in done.stdout and "tokens/s" in done.stdout
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_training_has_the_curve_of_an_uninterrupted_one(run, tmp_path):
    checkpoint = tmp_path / "run.pt"
    whole = losses(run(*SMALL, "--steps", 4, "--seed", 3, "--json"))
    first = losses(run(*SMALL, "--steps", 2, "--seed", 3, "--json", "--checkpoint", checkpoint))
    assert first == {way: curve[:2] for way, curve in whole.items()}
    torch.rand(5)       # what the generator was at is in the file
    assert losses(run(*SMALL, "--steps", 4, "--seed", 3, "--json", "--checkpoint", checkpoint, "--resume")) == whole
    assert losses(run(*SMALL, "--steps", 4, "--seed", 3, "--json", "--checkpoint", checkpoint, "--resume")) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_save_that_fails_leaves_the_old_checkpoint(run, example, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.pt"
    losses(run(*SMALL, "--steps", 1, "--json", "--checkpoint", checkpoint))
    before, right = checkpoint.read_bytes(), torch.save

    def fails(state, path):
        right({}, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        example["save"](checkpoint, {}, {})
    assert checkpoint.read_bytes() == before


def test_curves_that_differ_fail(run, monkeypatch):
    right = integration.fused_moe
    monkeypatch.setattr(integration, "fused_moe", lambda *args, **options: right(*args, **options) * 1.1)
    done = run(*SMALL, "--steps", 4)
    assert done.exit_code == 1 and "DO NOT AGREE" in done.output


@pytest.mark.parametrize("arguments, said", [
    (("--top-k", 17), "there are 16 experts, got 17"), (("--steps", 0), "--steps"), (("--dtype", "int8"), "int8"),
    (("--device", "cuda"), "cuda"), (("--resume",), "--checkpoint"), (("--plot", "/no/such/place/a.png"), "/no/such/place"),
    (("--checkpoint", "/no/such/place/a.pt"), "/no/such/place"), (("--checkpoint", EXAMPLE), "exists"),
    (("--checkpoint", EXAMPLE, "--resume"), "is no checkpoint"), (("--checkpoint", "none.pt", "--resume"), "none.pt")])
def test_wrong_options(run, arguments, said):
    done = run(*arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())


@pytest.mark.skipif(torch.xpu.is_available(), reason="torch has an xpu here")
def test_no_xpu(run):
    done = run("--device", "xpu")
    assert done.exit_code == 2 and "xpu" in done.output


def test_a_checkpoint_of_other_options(run, tmp_path):
    checkpoint = tmp_path / "run.pt"
    losses(run(*SMALL, "--steps", 1, "--json", "--checkpoint", checkpoint))
    done = run(*SMALL, "--hidden-size", 48, "--steps", 2, "--checkpoint", checkpoint, "--resume")
    assert done.exit_code == 2 and "made with --hidden-size 32, got 48" in " ".join(done.output.replace("│", " ").split())


def test_missing_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(*SMALL, "--plot", tmp_path / "a.png")
    assert done.exit_code == 1 and "matplotlib" in done.output
