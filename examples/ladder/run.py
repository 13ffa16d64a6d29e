"""Six programs from a loop over experts to the tile queue, each one idea further: compiled, verified and timed on the CPU device.

    python examples/ladder/run.py                            # gpt-oss-20b's recorded rows per expert, an eighth of them
    python examples/ladder/run.py --layer 12 --workers 8     # another layer; idle time counted for 8 work-groups

All six compute the same, the first half of an MoE block: h = silu(gate) * up, where gate and up are the halves of a row's
product with its expert's weights. What a program leaves to others, torch does, and its time counts. README.md tells the story.
"""
import heapq
import json as jsonlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from moe_xe.bench.numerics import difference
from moe_xe.bench.workloads import load_layers, recorded_layers
from moe_xe.device import queue_for
from moe_xe.jit import KernelSource, compile_kernel

CPU = torch.device("cpu")
TALL, RAGGED = (32,), (32, 8, 2)     # rows of a tile, as in the programs
TILE_COLUMNS = 32                    # of the output


@dataclass(frozen=True)
class Step:
    """One program. heights: of its tiles; what it does itself: everything in one launch, a queue, the gather, the activation."""
    file: str
    signature: str                   # of the kernel: p pointer, i int32
    idea: str
    heights: tuple[int, ...] = RAGGED
    one_launch: bool = True
    queue: bool = True
    gathers: bool = False
    activates: bool = False

    @property
    def kernel(self) -> KernelSource:
        return KernelSource(self.file.split("_", 1)[1], self.signature, (Path(__file__).parent / f"{self.file}.cpp").read_text())


STEPS = (Step("1_loop_over_experts", "pppiii", "loop over experts", TALL, one_launch=False, queue=False),
         Step("2_one_launch", "ppppiii", "one launch, static tiles", TALL, queue=False),
         Step("3_ragged_tiles", "ppppiii", "ragged tile heights", queue=False),
         Step("4_tile_queue", "pppppiii", "queue: one atomic a tile"),
         Step("5_gather", "ppppppiii", "gather in the loads", gathers=True),
         Step("6_activation", "ppppppiii", "activation in the epilogue", gathers=True, activates=True))


@dataclass(frozen=True)
class Case:
    """x [tokens, k]; tokens [rows]: the token of each row, sorted by expert; w [E, k, n]; counts: rows per expert."""
    x: torch.Tensor
    tokens: torch.Tensor
    w: torch.Tensor
    counts: list[int]

    @classmethod
    def random(cls, counts: list[int], intermediate: int, k: int, top_k: int) -> "Case":
        num_tokens = max(sum(counts) // top_k, 1)
        return cls(torch.randn(num_tokens, k), torch.randint(num_tokens, (sum(counts),), dtype=torch.int32),
                   torch.randn(len(counts), k, 2 * intermediate) * k**-0.5, counts)

    def reference(self) -> torch.Tensor:
        """h in float64, with torch."""
        rows = self.x.double()[self.tokens].split(self.counts)
        gate, up = torch.cat([part @ w.double() for part, w in zip(rows, self.w)]).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up


def program(step: Step, case: Case, groups: int) -> Callable[[], torch.Tensor]:
    """A call of the step's program with torch around it; returns h."""
    queue = queue_for(CPU)
    kernel = compile_kernel(queue, step.kernel)
    rows, (experts, k, n) = len(case.tokens), case.w.shape
    counts = torch.tensor(case.counts, dtype=torch.int32)
    out = torch.full((rows, n // 2 if step.activates else n), float("nan"))

    def run() -> torch.Tensor:
        a = case.x if step.gathers else case.x[case.tokens]                   # without a gather of its own: a copy
        counter = torch.zeros(1, dtype=torch.int32)
        if step.one_launch:
            pointers = [a, *([case.tokens] if step.gathers else []), case.w, out, counts, *([counter] if step.queue else [])]
            kernel.launch(queue, groups, 1, (*(tensor.data_ptr() for tensor in pointers), experts, n, k))
        else:
            for w, a_rows, d_rows in zip(case.w, a.split(case.counts), out.split(case.counts)):
                tiles = -(-len(a_rows) // step.heights[0]) * (n // TILE_COLUMNS)
                if tiles:
                    kernel.launch(queue, tiles, 1, (a_rows.data_ptr(), w.data_ptr(), d_rows.data_ptr(), len(a_rows), n, k))
        queue.wait()
        if step.activates:
            return out
        gate, up = out.chunk(2, dim=1)
        return torch.nn.functional.silu(gate).mul_(up)                        # another pass over the result

    return run


def cut(rows: int, heights: Sequence[int]) -> list[int]:
    """The heights of one expert's row tiles."""
    tiles: list[int] = []
    for height in heights:
        fit = -(-rows // height) if height == heights[-1] else rows // height
        tiles += [height] * fit
        rows -= fit * height
    return tiles


def makespan(costs: list[int], workers: int, static: bool) -> int:
    """When the last of `workers` is done with tiles of these costs: fixed shares, or each next tile to the first that is free."""
    if static:
        return max(sum(costs[worker::workers]) for worker in range(workers))
    busy = [0] * workers
    for cost in costs:
        heapq.heappush(busy, heapq.heappop(busy) + cost)
    return max(busy)


def counted(step: Step, counts: list[int], n: int, k: int, workers: int) -> dict:
    """What needs no clock: launches, rows computed for each row needed, the workers' idle share, and MB that are written in
    between. A tile costs its height; the groups of a plain launch are handed out by the device as workers become free."""
    columns = n // 2 if step.activates else n
    experts = [cut(rows, step.heights) * (columns // TILE_COLUMNS) for rows in counts if rows]
    launches = [sum(experts, [])] if step.one_launch else experts
    work = sum(map(sum, launches))
    busy = workers * sum(makespan(costs, workers, step.one_launch and not step.queue) for costs in launches)
    between = sum(counts) * 4 * ((0 if step.gathers else k) + (0 if step.activates else n))
    return {"launches": len(launches), "computed_rows": work * TILE_COLUMNS / columns / sum(counts), "idle": 1 - work / busy, "copied_mb": between / 1e6}


@dataclass
class Time:
    """Seconds of the fastest run, and processor seconds, of all cores, of the cheapest one: what else the machine does only adds."""
    wall: float = float("inf")
    processor: float = float("inf")


def fastest(programs: dict[Step, Callable[[], object]], seconds: float) -> dict[Step, Time]:
    """All programs in turn until the time is over."""
    times = {step: Time() for step in programs}
    end = time.perf_counter() + seconds
    while True:
        for step, run in programs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            best, processor, wall = times[step], time.process_time() - processor, time.perf_counter() - wall
            best.wall, best.processor = min(best.wall, wall), min(best.processor, processor)
        if time.perf_counter() >= end:
            return times


def show(results: list[dict], workers: int) -> None:
    print(f"{'':28}{'':>9}{'rows x':>7}{'idle':>6}{'copied':>7}{'':>8}{'CPU':>7}")
    print(f"{'  idea':28}{'launches':>9}{'needed':>7}{f'of {workers}':>6}{'MB':>7}{'ms':>8}{'ms':>7}{'speed':>7}")
    for r in results:
        print(f"{r['step']:<2}{r['idea']:26}{r['launches']:>9}{r['computed_rows']:>7.2f}{r['idle']:>6.0%}{r['copied_mb']:>7.1f}{r['ms']:>8.2f}"
              f"{r['cpu_ms']:>7.1f}{r['speed']:>6.2f}x" if r["verified"] else f"{r['step']:<2}{r['idea']:26} WRONG: error {r['max_error']:.1e}")


def main(
    n: Annotated[int, typer.Option(help="Intermediate size, a multiple of 32: the weights have 2n columns.", min=32)] = 288,
    k: Annotated[int, typer.Option(help="Hidden size.", min=1)] = 576,
    rows: Annotated[Optional[Path], typer.Option(help="JSON: layers of rows per expert. [default: recorded gpt-oss-20b]")] = None,
    layer: Annotated[int, typer.Option(help="Which of the layers.", min=0)] = 1,
    divide: Annotated[int, typer.Option(help="Rows per expert are divided by this and rounded up.", min=1)] = 8,
    workers: Annotated[int, typer.Option(help="Work-groups that idle time is counted for: a B580 has 20 Xe cores.", min=1)] = 20,
    groups: Annotated[Optional[int], typer.Option(help="Work-groups of the timed launches. [default: one a core]", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Of all measurements together.", min=0)] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of the table.")] = False,
):
    """Run, verify and time the six programs; the exit status is 1 if one is wrong."""
    try:
        layers = load_layers(rows) if rows else recorded_layers()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows")
    if layer >= len(layers) or not sum(layers[layer]):
        raise typer.BadParameter(f"there are rows for {len(layers)} layers, and layer {layer} must have some", param_hint="--layer")
    if n % 32:
        raise typer.BadParameter(f"must be a multiple of 32, got {n}: the programs leave out what ragged columns need", param_hint="--n")
    torch.manual_seed(0)
    counts = [-(-count // divide) for count in layers[layer]]
    case = Case.random(counts, n, k, top_k=4)
    programs = {step: program(step, case, groups or queue_for(CPU).device.xe_cores) for step in STEPS}
    reference = case.reference()
    torch.set_num_threads(1)    # torch's threads would spin on, after its part, on the cores that the next kernel needs
    found = {step: run().clone() for step, run in programs.items()}
    times = fastest(programs, seconds)
    errors = {step: difference(h, reference).max_error for step, h in found.items()}
    results = [{"step": number, "idea": step.idea, **counted(step, counts, 2 * n, k, workers), "ms": 1e3 * times[step].wall,
                "cpu_ms": 1e3 * times[step].processor, "speed": times[STEPS[0]].wall / times[step].wall, "verified": errors[step] <= 2**-18 * k**0.5,
                "max_error": errors[step]} for number, step in enumerate(STEPS, start=1)]
    if json:
        print(jsonlib.dumps(results, indent=1))
    else:
        print(f"{sum(counts)} rows of {len(counts)} experts, {min(counts)} to {max(counts)} each; "
              f"[rows, {k}] x [{k}, {2 * n}] in float32\n")
        show(results, workers)
    if not all(r["verified"] for r in results):
        print("verification failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
