"""Trains a small Qwen3-MoE on moe_xe's experts, and beside it one on Transformers' own: same seed, same batches.

    python examples/train_tiny_moe.py --plot losses.png
    python examples/train_tiny_moe.py --steps 2000 --checkpoint run.pt       # stop it whenever you like, and go on with
    python examples/train_tiny_moe.py --steps 2000 --checkpoint run.pt --resume

The text is Python's own documentation (pydoc_data.topics), byte by byte. The exit status is 1 if the two loss curves differ
by more than roundings do.
"""
import json as jsonlib
import os
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, Optional

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from moe_xe.cli.tables import new_table, print_table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("moe_xe", "eager")
LEARNING_RATE, WARM_UP_STEPS = 2e-3, 20
CHECKPOINT_STEPS = 50
# Between the two losses of a step. Training amplifies roundings: a token whose experts are nearly tied goes to another
# one, so the first steps are held to roundings themselves, and all steps to what becomes of them.
FIRST_STEPS = 5
FIRST_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
TOLERANCE = {"fp32": 0.05, "bf16": 0.15}


def read_text() -> torch.Tensor:
    """[about 460 000] bytes, as int64."""
    topics = pydoc_data.topics.topics
    return torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))


def make_model(way: str, options: dict, device: torch.device) -> torch.nn.Module:
    """Two layers; the same seed gives the same parameters."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=options["hidden_size"], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=options["hidden_size"], num_experts=options["experts"],
        num_experts_per_tok=options["top_k"], norm_topk_prob=True, max_position_embeddings=options["seqlen"],
        pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)
    torch.manual_seed(options["seed"])
    model = AutoModelForCausalLM.from_config(config, experts_implementation=way, dtype=DTYPES[options["dtype"]])
    return model.to(device).train()


class Clock:
    """Seconds since it was made, and those of them that the experts took, forward and backward."""

    def __init__(self, model: torch.nn.Module):
        self.device = model.device
        self.experts_seconds = 0.0
        self.hooks = [
            hook for name, module in model.named_modules() if name.endswith(".experts")
            for hook in (module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop),
                         module.register_full_backward_pre_hook(self._start), module.register_full_backward_hook(self._stop))]
        self.begin = self._now()

    def _now(self) -> float:
        if self.device.type == "xpu":
            torch.xpu.synchronize(self.device)
        return time.perf_counter()

    def _start(self, *_) -> None:
        self.started = self._now()

    def _stop(self, *_) -> None:
        self.experts_seconds += self._now() - self.started

    def stop(self) -> dict[str, float]:
        for hook in self.hooks:
            hook.remove()
        return {"step": self._now() - self.begin, "experts": self.experts_seconds}


class Training:
    """A model, its optimizer, and what came of the steps so far: a loss and seconds of each."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        self.losses: list[float] = []
        self.seconds: list[dict[str, float]] = []

    def step(self, tokens: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(self.losses) + 1) / WARM_UP_STEPS)
        clock = Clock(self.model)
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(clock.stop())
        self.losses.append(loss.item())

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "losses": self.losses,
                "seconds": self.seconds}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def save(path: Path, trainings: dict[str, Training], options: dict) -> None:
    """Replaces the file at once, so that one that is stopped meanwhile leaves the old one."""
    state = {way: training.state() for way, training in trainings.items()}
    new = path.with_name(path.name + ".new")
    torch.save({"options": options, "rng": torch.get_rng_state(), **state}, new)
    os.replace(new, path)


def load(path: Path, trainings: dict[str, Training], options: dict) -> None:
    """ValueError unless it is a checkpoint of a training with these options."""
    try:
        state = torch.load(path, weights_only=True)
        saved = state["options"]
    except Exception as error:      # torch names a dozen kinds
        raise ValueError(f"{path} is no checkpoint of this program: {error}") from error
    for name, value in options.items():
        if saved[name] != value:
            raise ValueError(f"{path} was made with --{name.replace('_', '-')} {saved[name]}, got {value}")
    for way, training in trainings.items():
        training.load(state[way])
    torch.set_rng_state(state["rng"])


def train(trainings: dict[str, Training], text: torch.Tensor, steps: int, options: dict, checkpoint: Optional[Path],
          console: Console) -> None:
    """Up to `steps` steps of each training in turn, on the same batches."""
    first = trainings["moe_xe"]
    device, places = first.model.device, torch.arange(options["seqlen"])
    with Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=console, transient=True) as progress:
        task = progress.add_task("steps", total=steps, completed=len(first.losses), loss="")
        while len(first.losses) < steps:
            starts = torch.randint(len(text) - options["seqlen"], (options["batch"], 1))
            for training in trainings.values():
                training.step(text[starts + places].to(device))
            progress.update(task, advance=1, loss=f"loss {first.losses[-1]:.3f}")
            if checkpoint and (len(first.losses) % CHECKPOINT_STEPS == 0 or len(first.losses) == steps):
                save(checkpoint, trainings, options)


def summary(trainings: dict[str, Training], options: dict) -> dict:
    """Tokens a second are of the median step."""
    tokens = options["batch"] * options["seqlen"]
    differences = [abs(a - b) for a, b in zip(*(trainings[way].losses for way in WAYS))]
    dtype = options["dtype"]
    return {
        **options, "steps": len(differences), "first_difference": max(differences[:FIRST_STEPS]),
        "max_difference": max(differences), "mean_difference": statistics.mean(differences),
        "agrees": max(differences[:FIRST_STEPS]) <= FIRST_TOLERANCE[dtype] and max(differences) <= TOLERANCE[dtype],
        **{way: {"loss": training.losses, **{
            f"{part}_tokens_per_s": tokens / statistics.median(seconds[part] for seconds in training.seconds)
            for part in ("step", "experts")}} for way, training in trainings.items()}}


def show(result: dict, console: Console) -> None:
    table = new_table("experts", "first loss", "last loss", "tokens/s", "experts' tokens/s", text=("experts",),
                      title="tokens a second of the median step, forward and backward")
    for way in WAYS:
        r = result[way]
        table.add_row(way, f"{r['loss'][0]:.4f}", f"{r['loss'][-1]:.4f}", f"{r['step_tokens_per_s']:.0f}", f"{r['experts_tokens_per_s']:.0f}")
    print_table(table, console)
    verdict = "agree" if result["agrees"] else "[red]DO NOT AGREE[/red]"
    console.print(f"the loss curves {verdict}: they differ by at most {result['first_difference']:.1e} in the first {FIRST_STEPS} steps, "
                  f"{result['max_difference']:.1e} in {result['steps']}, {result['mean_difference']:.1e} on average")


def plot(result: dict, path: Path) -> None:
    """Writes a PNG: both losses, and their difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, differences = figure.subplots(1, 2)
    for way, style in zip(WAYS, ("-", "--")):
        losses.plot(result[way]["loss"], style, label=way)
    losses.set(xlabel="step", ylabel="loss", title=f"Qwen3-MoE, hidden {result['hidden_size']}, {result['experts']} experts, "
               f"top {result['top_k']}, {result['dtype']}")
    losses.legend()
    differences.plot([max(abs(a - b), 1e-9) for a, b in zip(*(result[way]["loss"] for way in WAYS))])
    differences.set(xlabel="step", ylabel="difference of the losses", yscale="log")
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def check_options(experts: int, top_k: int, device: str, checkpoint: Optional[Path], resume: bool, picture: Optional[Path]) -> None:
    if top_k > experts:
        raise typer.BadParameter(f"there are {experts} experts, got {top_k}", param_hint="--top-k")
    if device == "xpu" and not torch.xpu.is_available():
        raise typer.BadParameter("torch finds no xpu device here", param_hint="--device")
    if resume and not (checkpoint and checkpoint.is_file()):
        raise typer.BadParameter(f"needs the file of --checkpoint, got {checkpoint}", param_hint="--resume")
    if checkpoint and checkpoint.exists() and not resume:
        raise typer.BadParameter(f"{checkpoint} exists; --resume goes on with it", param_hint="--checkpoint")
    for option, path in (("--checkpoint", checkpoint), ("--plot", picture)):
        if path and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.absolute().parent}", param_hint=option)


def main(
    steps: Annotated[int, typer.Option(help="Steps of training, those of a checkpoint included.", min=1)] = 400,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 16,
    seqlen: Annotated[int, typer.Option(help="Bytes of a sequence.", min=2, max=4096)] = 128,
    hidden_size: Annotated[int, typer.Option(help="Hidden size, and the experts' intermediate size.", min=1)] = 128,
    experts: Annotated[int, typer.Option(help="Experts of a layer.", min=1)] = 16,
    top_k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 4,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of parameters and activations.")] = "fp32",
    device: Annotated[Literal["cpu", "xpu"], typer.Option(help="Where to train.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of parameters and batches.")] = 0,
    checkpoint: Annotated[Optional[Path], typer.Option(help=f"File to save to, every {CHECKPOINT_STEPS} steps and at the end.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --checkpoint.")] = False,
    picture: Annotated[Optional[Path], typer.Option("--plot", help="PNG: the loss curves.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
):
    """Train a small Qwen3-MoE with experts_implementation "moe_xe" and "eager"; exit status 1 if their losses differ."""
    check_options(experts, top_k, device, checkpoint, resume, picture)
    console = Console(stderr=json, highlight=False)
    try:
        from moe_xe.bench.plot import require_matplotlib
        from moe_xe.integrations import transformers
        transformers.register()
        if picture:
            require_matplotlib()
    except ImportError as error:
        console.print(str(error), markup=False)
        raise typer.Exit(1)
    options = {"batch": batch, "seqlen": seqlen, "hidden_size": hidden_size, "experts": experts, "top_k": top_k, "dtype": dtype, "seed": seed}
    trainings = {way: Training(make_model(way, options, torch.device(device))) for way in WAYS}
    torch.manual_seed(seed)
    if resume:
        try:
            load(checkpoint, trainings, options)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--resume")
    train(trainings, read_text(), steps, options, checkpoint, console)
    result = summary(trainings, options)
    print(jsonlib.dumps(result)) if json else show(result, console)
    if picture:
        plot(result, picture)
    if not result["agrees"]:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
