"""Trains a small MoE model whose experts are spread over several processes, and beside it the same one in a single process.

    torchrun --nproc_per_node 4 examples/expert_parallel.py
    python examples/expert_parallel.py --ranks 4        # starts torchrun itself

Each rank has a share of every layer's experts, all other parameters, and a share of the batch: a token's row travels to the ranks of its
experts and back. The exit status is 1 if losses differ by more than roundings do, or if the two models generate different text.
"""
import json as jsonlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Optional

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from train_tiny_moe import FIRST_STEPS, FIRST_TOLERANCE, TOLERANCE, read_text

import moe_xe
from moe_xe.bench.sent_bytes import SentBytes
from moe_xe.cli.tables import new_table, print_table
from moe_xe.distributed import expert_parallel_moe

HEAD_DIM, TOP_K, LEARNING_RATE = 32, 2, 2e-3


class Layer(nn.Module):
    """Causal attention and a block of experts, by default in this process."""

    def __init__(self, hidden_size: int, experts: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(hidden_size, 3 * hidden_size, bias=False), nn.Linear(hidden_size, hidden_size, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden_size) for _ in range(2))
        self.router = nn.Linear(hidden_size, experts, bias=False)
        self.w13 = nn.Parameter(torch.randn(experts, 2 * hidden_size, hidden_size) * hidden_size**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden_size, hidden_size) * hidden_size**-0.5)
        self.moe: Callable = moe_xe.fused_moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        rows = self.norms[1](x).flatten(0, 1)
        topk_weights, self.topk_ids = moe_xe.route(self.router(rows), TOP_K, renormalize=True)
        return x + self.moe(rows, self.w13, self.w2, topk_weights, self.topk_ids).view_as(x)


class Model(nn.Module):
    def __init__(self, layers: int, hidden_size: int, experts: int, seqlen: int):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, hidden_size), nn.Embedding(seqlen, hidden_size)
        self.layers = nn.Sequential(*(Layer(hidden_size, experts) for _ in range(layers)))
        self.head = nn.Sequential(nn.RMSNorm(hidden_size), nn.Linear(hidden_size, 256, bias=False))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.bytes(text) + self.places.weight[:text.shape[1]]))


def spread(model: Model, group: dist.ProcessGroup, chunks: Optional[int]) -> list[nn.Parameter]:
    """Leaves each layer this rank's experts, and returns their weights."""
    def moe(*arguments):
        return expert_parallel_moe(*arguments, group=group, chunks=chunks)

    for layer in model.layers:
        for name in ("w13", "w2"):
            mine = getattr(layer, name).tensor_split(group.size())[group.rank()]
            setattr(layer, name, nn.Parameter(mine.detach().clone()))
        layer.moe = moe
    return [w for layer in model.layers for w in (layer.w13, layer.w2)]


def train(model: Model, batches: list[torch.Tensor], ranks: int = 1, experts: Sequence[nn.Parameter] = ()) -> tuple[list[float], float]:
    """The mean loss of each batch, of which this process has one of `ranks` equal shares, and seconds of a step, the first left out.

    experts: weights whose gradients have all ranks' tokens in them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    complete = {id(w) for w in experts}
    losses, times = [], []
    for text in batches:
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()) / ranks
        loss.backward()
        loss = loss.detach()
        if ranks > 1:
            for tensor in (loss, *(p.grad for p in model.parameters() if id(p) not in complete)):
                dist.all_reduce(tensor)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter())
    return losses, (times[-1] - times[0]) / (len(times) - 1)


@torch.no_grad()
def generate(model: Model, text: torch.Tensor, length: int) -> tuple[torch.Tensor, float]:
    """The prompts [n, bytes], continued by the likeliest bytes up to this length; and seconds of one of these, the first left out."""
    times = []
    while text.shape[1] < length:
        text = torch.cat([text, model(text)[:, -1:].argmax(2)], 1)
        text.cpu()      # waits for it
        times.append(time.perf_counter())
    return text, (times[-1] - times[0]) / (len(times) - 1)


@torch.no_grad()
def sent_bytes(model: Model, text: torch.Tensor, group: dist.ProcessGroup, experts: int) -> dict[str, float]:
    """By all ranks, of one layer and forward pass: what was sent, a row for each rank that a token must reach, and one for each pair."""
    with SentBytes(group.rank()) as counted:
        model(text)
    rank_of = torch.cat([torch.full((len(part),), rank) for rank, part in enumerate(torch.arange(experts).tensor_split(group.size()))])
    remote = least = 0
    for layer in model.layers:
        ranks = rank_of[layer.topk_ids.cpu().long()]
        elsewhere = F.one_hot(ranks, group.size())
        elsewhere[..., group.rank()] = 0
        remote, least = remote + elsewhere.sum(), least + elsewhere.amax(1).sum()
    row = 2 * model.bytes.weight[0].nbytes      # there and back
    totals = torch.tensor([counted.number, row * least, row * remote], dtype=torch.float64, device=text.device) / len(model.layers)
    dist.all_reduce(totals)
    return dict(zip(("sent", "least", "pairs"), totals.tolist()))


def run(options: dict, device: torch.device, chunks: Optional[int]) -> dict:
    """On each rank: both trainings, the single process's on rank 0 while the others wait."""
    group, source = dist.group.WORLD, read_text()
    rank, ranks = group.rank(), group.size()
    torch.manual_seed(options["seed"])
    starts = torch.randint(len(source) - options["seqlen"], (options["steps"] + 1, options["batch"], 1))
    *batches, prompts = source[starts + torch.arange(options["seqlen"])].to(device)
    prompts = prompts[:, :options["seqlen"] // 2]

    def measured(model: Model, share: slice, **spread) -> tuple[list[float], torch.Tensor, dict[str, float]]:
        losses, step = train(model, [text[share] for text in batches], **spread)
        text, byte = generate(model, prompts[share], options["seqlen"])
        return losses, text, {"trained": batches[0].numel() / step, "generated": len(prompts) / byte}

    def make() -> Model:
        torch.manual_seed(options["seed"])
        return Model(options["layers"], options["hidden_size"], options["experts"], options["seqlen"]).to(device)

    result = {"ranks": ranks, **options}
    if rank == 0:
        losses, text, result["one_process"] = measured(make(), slice(None))
    dist.barrier()
    model = make()
    share = slice(rank, None, ranks)
    spread_losses, spread_text, result["spread"] = measured(model, share, ranks=ranks, experts=spread(model, group, chunks))
    result["bytes"] = sent_bytes(model, batches[0][share], group, options["experts"])
    parts = [torch.empty_like(spread_text) for _ in range(ranks)]
    dist.all_gather(parts, spread_text)
    if rank == 0:
        differences = [abs(a - b) for a, b in zip(losses, spread_losses)]
        limits, found = (FIRST_TOLERANCE["fp32"], TOLERANCE["fp32"]), (max(differences[:FIRST_STEPS]), max(differences))
        result |= {"loss": losses, "spread_loss": spread_losses, "differences": found, "limits": limits,
                   "same_text": torch.equal(torch.stack(parts, 1).flatten(0, 1), text)}
        result["agrees"] = result["same_text"] and all(a <= b for a, b in zip(found, limits))
    return result


def show(result: dict) -> None:
    console = Console(highlight=False)
    table = new_table("experts", "first\nloss", "last\nloss", "tokens/s,\ntrained", "tokens/s,\ngenerated", text=("experts",))
    for name, losses, of in (("in one process", "loss", "one_process"), (f"on {result['ranks']} ranks", "spread_loss", "spread")):
        table.add_row(name, *(f"{result[losses][at]:.4f}" for at in (0, -1)), *(f"{result[of][what]:.0f}" for what in ("trained", "generated")))
    print_table(table, console)
    found, limits, sent = result["differences"], result["limits"], result["bytes"]
    console.print(f"losses differ by {found[0]:.0e} (limit {limits[0]:g}) in the first {FIRST_STEPS} steps, {found[1]:.0e} ({limits[1]:g}) in all")
    console.print(f"sent for a layer: {sent['sent'] / 1e6:.3f} MB, of at least {sent['least'] / 1e6:.3f} MB for rows; "
                  f"{sent['pairs'] / 1e6:.3f} MB if\neach pair of token and expert had its own", soft_wrap=True)
    console.print(f"the same text is {'generated' if result['same_text'] else '[red]NOT GENERATED[/red]'}")
    console.print("the losses agree" if result["agrees"] or not result["same_text"] else "the losses [red]DO NOT AGREE[/red]")


def main(
    ranks: Annotated[int, typer.Option(help="Processes to start, without torchrun.", min=2)] = 4,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=2)] = 60,
    batch: Annotated[int, typer.Option(help="Sequences of a step, of all ranks together.", min=1)] = 16,
    seqlen: Annotated[int, typer.Option(help="Bytes of a sequence.", min=8)] = 64,
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=1)] = 2,
    hidden_size: Annotated[int, typer.Option(help=f"A multiple of {HEAD_DIM}; the experts' intermediate size, too.", min=HEAD_DIM)] = 128,
    experts: Annotated[int, typer.Option(help=f"Experts of a layer; each token has {TOP_K}.", min=TOP_K)] = 16,
    chunks: Annotated[Optional[int], typer.Option(help="Parts of the tokens that travel while others are computed.", min=1)] = None,
    device: Annotated[Literal["cpu", "xpu"], typer.Option(help="cpu (gloo), or xpu (xccl): a device for each rank.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of parameters and batches.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print an object instead of a table.")] = False,
):
    """Train and generate with experts on several ranks and in one process; exit status 1 if losses or text differ."""
    if hidden_size % HEAD_DIM:
        raise typer.BadParameter(f"must be a multiple of {HEAD_DIM}, got {hidden_size}", param_hint="--hidden-size")
    ranks = int(os.environ.get("WORLD_SIZE", ranks))
    if batch % ranks:
        raise typer.BadParameter(f"must be a multiple of the {ranks} ranks, got {batch}", param_hint="--batch")
    if device == "xpu" and not torch.xpu.is_available():
        raise typer.BadParameter("torch finds no xpu device here", param_hint="--device")
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        sys.exit(subprocess.run([*torchrun, __file__, *sys.argv[1:]]).returncode)
    where = torch.device(device, int(os.environ["LOCAL_RANK"]) if device == "xpu" else None)
    if device == "xpu":
        torch.xpu.set_device(where)
    dist.init_process_group("xccl" if device == "xpu" else "gloo")
    options = {"steps": steps, "batch": batch, "seqlen": seqlen, "layers": layers, "hidden_size": hidden_size, "experts": experts, "seed": seed}
    result = run(options, where, chunks)
    if dist.get_rank() == 0:
        print(jsonlib.dumps(result)) if json else show(result)
    dist.barrier()
    dist.destroy_process_group()
    if not result.get("agrees", True):
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
