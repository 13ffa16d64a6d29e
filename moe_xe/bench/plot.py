"""Pictures of measurements."""
from __future__ import annotations

from pathlib import Path

from .block import Result
from .block_peers import PEERS


def require_matplotlib() -> None:
    """ImportError, saying what to install, unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib, which is not installed (pip install 'moe_xe[bench]')") from error


def plot_blocks(results: list[Result], path: Path) -> None:
    """Writes a PNG: for each model and dtype, time and share of the roofline over tokens. Raises OSError if it cannot."""
    from matplotlib.figure import Figure

    cases: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        cases.setdefault((result.model, result.dtype), []).append(result)
    figure = Figure(figsize=(11, 4 * len(cases)), layout="constrained")
    rows = figure.subplots(len(cases), 2, squeeze=False)
    for (times, shares), ((model, dtype), group) in zip(rows, cases.items()):
        group.sort(key=lambda result: result.tokens)
        for way in ("moe_xe", *PEERS):
            points = [(r.tokens, ms) for r in group if (ms := getattr(r, f"{way}_ms")) is not None]
            if points:
                times.plot(*zip(*points), marker="o", markersize=3, linewidth=2 if way == "moe_xe" else 1, label=way)
        first = group[0]
        times.set(yscale="log", ylabel="milliseconds", title=f"{model} {dtype}, {first.mode}, on {first.device}")
        times.legend()
        points = [(r.tokens, 100 * r.roofline) for r in group if r.roofline is not None]
        if points:
            shares.plot(*zip(*points), marker="o", markersize=3, linewidth=2)
        shares.set(ylabel="% of the roofline", title=f"hidden {first.hidden_size}, intermediate {first.intermediate_size}, "
                   f"{first.num_experts} experts, top {first.top_k}")
        shares.set_ylim(bottom=0)
        for axes in (times, shares):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("tokens")
            axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
