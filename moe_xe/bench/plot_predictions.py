"""Pictures of predictions, alone and beside published measurements."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..plan.block.expert_parallel import LayerPrediction
from .predictions import Case, Layers
from .published import Comparison


def plot_cases(cases: Sequence[Case], path: Path) -> None:
    """Writes a PNG: predicted rate and share of the roofline over tokens. Raises OSError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    rates, shares = figure.subplots(1, 2)
    for model, n, k in dict.fromkeys((case.model, case.n, case.k) for case in cases):
        points = sorted((case.tokens, case.tflops, case.roofline) for case in cases
                        if (case.model, case.n, case.k) == (model, n, k))
        tokens, tflops, roofline = zip(*points)
        rates.plot(tokens, tflops, marker="o", markersize=3, label=f"{model}, {n} x {k}")
        shares.plot(tokens, [100 * share for share in roofline], marker="o", markersize=3)
    rates.set(xscale="log", yscale="log", xlabel="tokens", ylabel="TFLOP/s")
    shares.set(xscale="log", ylim=(0, 105), xlabel="tokens", ylabel="% of the roofline")
    for axes in (rates, shares):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    rates.legend()
    figure.suptitle(f"moe_xe on {cases[0].device}: predicted, not measured")
    figure.savefig(path, format="png", dpi=120)


def plot_layers(layers: Sequence[tuple[Layers, list[tuple[tuple[int, int], LayerPrediction]]]], path: Path) -> None:
    """Writes a PNG: for each model, a layer's predicted time and what communication adds to it over ranks, a line for each number of tokens of a
    rank. layers: with ((ranks, tokens), prediction) each. Raises OSError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5 * len(layers)), layout="constrained")
    for (times, shares), (each, predictions) in zip(figure.subplots(len(layers), 2, squeeze=False), layers):
        for tokens in dict.fromkeys(tokens for (_, tokens), _ in predictions):
            points = [(ranks, layer) for (ranks, number), layer in predictions if number == tokens]
            ranks = [ranks for ranks, _ in points]
            line, = times.plot(ranks, [1e3 * layer.seconds for _, layer in points], marker="o", markersize=3, label=f"{tokens} tokens a rank")
            times.plot(ranks, [1e3 * layer.compute for _, layer in points], color=line.get_color(), linewidth=1, linestyle="--")
            shares.plot(ranks, [100 * layer.share for _, layer in points], marker="o", markersize=3, color=line.get_color())
        times.set(yscale="log", ylabel="milliseconds of a layer; dashed: computing alone", title=f"{each.model.name} on {each.device.name}")
        shares.set(ylim=(0, 100), ylabel="% that communication adds", title=f"{each.link.name}, hosts of {each.link.ranks} by {each.network.name}")
        times.legend()
        for axes in (times, shares):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("ranks")
            axes.grid(alpha=0.3)
    figure.suptitle("expert parallelism: predicted, not measured")
    figure.savefig(path, format="png", dpi=120)


def plot_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """Writes a PNG: predicted over measured milliseconds, with the band of 25 %. Raises OSError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 7), layout="constrained")
    axes = figure.subplots()
    ends = (0.9e3 * min(c.measured for c in comparisons), 1.1e3 * max(c.measured for c in comparisons))
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], alpha=0.15, label="within 25 %")
    for source in dict.fromkeys(c.source for c in comparisons):
        points = [(1e3 * c.measured, 1e3 * c.predicted) for c in comparisons if c.source == source]
        axes.plot(*zip(*points), marker="o", markersize=4, linestyle="", label=source.partition(":")[0])
    axes.set(xscale="log", yscale="log", xlabel="measured, milliseconds", ylabel="predicted, milliseconds",
             title="The cost model beside published measurements of other libraries")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
