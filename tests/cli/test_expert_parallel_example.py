"""examples/expert_parallel.py: what it trains, generates and compares, its options, and what it prints."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer import Typer
from typer.testing import CliRunner

from tests.distributed.processes import ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "expert_parallel.py"
SMALL = {"batch": 4, "seqlen": 16, "layers": 2, "hidden_size": 32, "experts": 5}


def on_rank(rank, chunks, wrong):
    """The example's run; wrong: with experts on ranks that give a little too much."""
    example = runpy.run_path(str(EXAMPLE))
    names = example["run"].__globals__
    if wrong:
        right = names["expert_parallel_moe"]
        names["expert_parallel_moe"] = lambda *arguments, **options: 1.01 * right(*arguments, **options)
    result = example["run"]({**SMALL, "steps": 6, "seed": 3}, torch.device("cpu"), chunks)
    dist.barrier()
    return result


@pytest.mark.parametrize("chunks, wrong", [(2, False), (None, True)])
def test_both_learn_and_write_the_same(chunks, wrong):
    first, second = ranks(2).run(on_rank, chunks, wrong)
    assert first["agrees"] is not wrong and "agrees" not in second and first["bytes"] == second["bytes"]
    assert len(first["loss"]) == len(first["spread_loss"]) == 6 and first["loss"][-1] < first["loss"][0]
    assert 2 * first["bytes"]["least"] % (2 * 32 * 4) == 0 and first["bytes"]["least"] < first["bytes"]["sent"] < 1.3 * first["bytes"]["least"]
    assert first["bytes"]["pairs"] > first["bytes"]["least"]
    if not wrong:
        assert first["same_text"] and first["differences"][1] < 1e-4
        assert all(first[of][what] > 0 for of in ("one_process", "spread") for what in ("trained", "generated"))


@pytest.fixture
def run(monkeypatch):
    main = runpy.run_path(str(EXAMPLE))["main"]
    app = Typer()
    app.command()(main)

    def run(*arguments, result=None, **environment):
        """result: what training gives, as on rank 0 of a torchrun of one process."""
        names = main.__globals__
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if result is not None:
            monkeypatch.setitem(names, "run", lambda *_: result)
            for function in ("init_process_group", "barrier", "destroy_process_group"):
                monkeypatch.setattr(dist, function, lambda *_: None)
            monkeypatch.setattr(dist, "get_rank", lambda: 0)
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.mark.parametrize("same_text, differs", [(True, 1e-6), (False, 1e-6), (True, 0.2)])
def test_what_is_printed(run, same_text, differs):
    agrees = same_text and differs < 0.1
    result = {"ranks": 4, "loss": [3.0, 2.0], "spread_loss": [3.0, 2.0], "differences": (1e-7, differs), "limits": (1e-4, 0.05), "agrees": agrees,
              "same_text": same_text, "one_process": {"trained": 100, "generated": 10}, "spread": {"trained": 900, "generated": 90},
              "bytes": {"sent": 1_100_000, "least": 1_000_000, "pairs": 2_000_000}}
    done = run(result=result, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    assert done.exit_code == (not agrees)
    for said in ("on 4 ranks", "1.100 MB", "the same text is " + ("generated" if same_text else "NOT"), "900"):
        assert said in done.output
    assert ("DO NOT AGREE" in done.output) is (differs > 0.1)


def test_torchrun_is_started(run, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda command: started.append(command) or subprocess.CompletedProcess(command, 3))
    monkeypatch.setattr(sys, "argv", ["expert_parallel.py", "--ranks", "2", "--steps", "7"])
    assert run("--ranks", 2, "--steps", 7).exit_code == 3
    assert started[0][-5:] == [str(EXAMPLE), "--ranks", "2", "--steps", "7"] and started[0][-7:-5] == ["--nproc_per_node", "2"]


@pytest.mark.full
def test_the_whole_program():
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = subprocess.run([sys.executable, EXAMPLE, "--ranks", "2", "--steps", "3", *options, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["agrees"]


@pytest.mark.parametrize("arguments, said", [
    (("--hidden-size", 48), "must be a multiple of 32, got 48"), (("--batch", 6), "must be a multiple of the 4 ranks, got 6"), (("--ranks", 1), "--ranks"),
    (("--steps", 1), "--steps"), (("--experts", 1), "--experts"), (("--chunks", 0), "--chunks"),
    pytest.param(("--device", "xpu"), "no xpu", marks=pytest.mark.skipif(torch.xpu.is_available(), reason="torch has an xpu here"))])
def test_wrong_options(run, arguments, said):
    done = run(*arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())
