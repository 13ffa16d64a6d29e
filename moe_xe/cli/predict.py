"""moe-xe predict: how long the grouped GEMM, or a block, would take on a device that is not here."""
import json as jsonlib
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from ..plan.problem import Dtype, WeightLayout
from .bench import _counts, _token_counts
from .tables import new_table, print_table, short

DTYPES = {"bf16": Dtype.bf16, "fp16": Dtype.f16}


def predict(
    device: Annotated[str, typer.Option(help="Part of a name: b60, b70, max1100, lunar-lake, ...; or cpu, which is measured.")] = "b60",
    model: Annotated[str, typer.Option(help="Comma-separated parts of the models' names.")] = "gpt-oss-20b",
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts.")] = "1,4,16,64,256,1024,4096,8192",
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    layout: Annotated[WeightLayout, typer.Option(help="Order of the weights in memory.")] = WeightLayout.enk,
    weights: Annotated[str, typer.Option(help="dense, or quantised as in checkpoints: mxfp4, int4, fp8, int8, w8a8; on Xe GPUs.")] = "dense",
    gathered: Annotated[bool, typer.Option("--gathered", help="The first GEMM reads its tokens where they lie.")] = False,
    block: Annotated[bool, typer.Option("--block", help="The whole block: launches, routing, sort, both GEMMs, sum.")] = False,
    y_dtype: Annotated[Optional[str], typer.Option(help="With --block: of the rows that are summed, fp32 or --dtype.")] = None,
    ranks: Annotated[str, typer.Option(help="Comma-separated: devices over which a layer's experts are spread; --tokens are each one's.")] = "1",
    link: Annotated[Optional[str], typer.Option(help="With --ranks: pcie4x8, pcie4x16, pcie5x8, pcie5x16 or xelink; default: the device's.")] = None,
    network: Annotated[str, typer.Option(help="With --ranks: between hosts, ib400 (an adapter for each rank) or ib400-shared.")] = "ib400-shared",
    chunks: Annotated[Optional[int], typer.Option(help="With --ranks: parts of the tokens that overlap; default: moe_xe's choice.", min=1)] = None,
    wire: Annotated[Optional[str], typer.Option(help="With --ranks: rows go to the experts as int8 or fp8_e4m3.")] = None,
    wire_back: Annotated[Optional[str], typer.Option(help="With --ranks: and so they come back.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Instead: published measurements of other libraries; with --block, "
                                                        "of their layers, beside moe_xe's predicted block.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Write a picture (PNG).")] = None,
):
    """Predicted time of both GEMMs of each model, or of its block, from the cost model (docs/choosing.md). Nothing is run on the device."""
    try:
        if plot:
            from ..bench.plot import require_matplotlib
            require_matplotlib()
        checkpoint = _checkpoint(weights, layout)
        if ranks != "1":
            from .predict_ranks import predict_ranks
            if check:
                raise typer.BadParameter("nothing is published to check layers on several devices with", param_hint="--check")
            layers = _layers(_device(device), _models(model), dtype, layout, *_kind_of(checkpoint), link, network, wire, wire_back)
            predict_ranks(layers, _counts(ranks, "--ranks"), _token_counts(tokens), chunks, json, plot)
        elif block:
            from .predict_block import check_blocks, predict_blocks
            _one_of("--dtype", dtype, DTYPES)
            y = None if y_dtype is None else _one_of("--y-dtype", y_dtype, {"fp32": Dtype.f32, dtype: DTYPES[dtype]})
            if check:
                check_blocks(y, json)
            else:
                predict_blocks(_device(device), _models(model), _token_counts(tokens), DTYPES[dtype], layout, y, weights,
                               *_kind_of(checkpoint), json)
        elif check:
            _check(json, plot)
        else:
            _predict(device, _models(model), _token_counts(tokens), dtype, layout, gathered, weights, *_kind_of(checkpoint), json, plot)
    except (ImportError, OSError) as error:
        Console(stderr=True).print(str(error), markup=False)
        raise typer.Exit(1)


def _models(text: str) -> list:
    from ..bench.workloads import MODELS

    found = []
    for part in text.split(","):
        named = [model for name, model in MODELS.items() if part.strip() and part.strip().lower() in name]
        if not named:
            raise typer.BadParameter(f"expected parts of {', '.join(MODELS)}, got {part.strip()!r}", param_hint="--model")
        found += named
    return found


def _one_of(option: str, name: str, values: dict):
    if name not in values:
        raise typer.BadParameter(f"expected {' or '.join(values)}, got {name!r}", param_hint=option)
    return values[name]


def _checkpoint(weights: str, layout: WeightLayout):
    from ..plan.formats import CHECKPOINTS

    checkpoint = _one_of("--weights", weights, {"dense": None, **CHECKPOINTS})
    if checkpoint is None:
        return None
    if layout is not WeightLayout.enk:
        raise typer.BadParameter(f"expected enk for quantised weights, got {layout.value!r}", param_hint="--layout")
    return checkpoint


def _kind_of(checkpoint) -> tuple:
    """Quantization of weights, and whether rows are int8, too."""
    return (None, False) if checkpoint is None else (checkpoint.quantization, checkpoint.int8_rows)


def _device(name: str):
    from ..bench.predictions import device_record

    try:
        return device_record(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device")


def _layers(device, models, dtype, layout, quantization, int8_rows, link, network, wire, wire_back) -> list:
    from ..bench.predictions import Layers
    from ..distributed.message import WIRES
    from ..plan.model.links import LINKS, NETWORKS

    if device.architecture is None:
        raise typer.BadParameter(f"--ranks is for Xe GPUs, got {device.name}", param_hint="--device")
    if link is None and not device.link:
        raise typer.BadParameter(f"{device.name} has no link of its own: name one of {', '.join(LINKS)}", param_hint="--link")
    for option, given in (("--wire", wire), ("--wire-back", wire_back)):
        _one_of(option, given or "int8", WIRES)
    between = _one_of("--link", link or device.link, LINKS), _one_of("--network", network, NETWORKS)
    return [Layers(model, device, _one_of("--dtype", dtype, DTYPES), layout, quantization, int8_rows, *between, wire, wire_back)
            for model in models]


def _predict(device, models, token_counts, dtype, layout, gathered, weights, quantization, int8_rows, json, plot):
    from ..bench.predictions import predict_case

    input, record = _one_of("--dtype", dtype, DTYPES), _device(device)
    if quantization is not None and record.architecture is None:
        raise typer.BadParameter(f"quantised weights are predicted for Xe GPUs, got {record.name}", param_hint="--device")
    cases = [predict_case(model, gemm, count, record, input, layout, gathered, quantization, int8_rows)
             for model in models for gemm in (0, 1) for count in token_counts]
    if plot:
        from ..bench.plot_predictions import plot_cases
        plot_cases(cases, plot)
    if json:
        print(jsonlib.dumps({"predicted": True, "device": record.name, "dtype": dtype, "layout": layout.value, "weights": weights,
                             "cases": [case.as_dict() for case in cases]}, indent=1))
        return
    print(f"PREDICTED, not measured: {record.name}, {dtype}, {layout.value}, {weights} weights;\ntime on the device, without the launch")
    for gemm in dict.fromkeys((case.model, case.n, case.k) for case in cases):
        table = new_table("tokens", "rows", "tiles", "ms", "TFLOP/s", "roofline", "bound by", title="{}, {} x {}".format(*gemm), text=("tiles", "bound by"))
        for case in (case for case in cases if (case.model, case.n, case.k) == gemm):
            table.add_row(str(case.tokens), str(case.rows), case.config, short(case.ms), f"{case.tflops:.3g}", f"{case.roofline:.0%}", case.bound_by)
        print_table(table)


def _check(json, plot):
    from ..bench.published import comparisons

    found = list(comparisons())
    close = sum(abs(comparison.error) <= 0.25 for comparison in found)
    if plot:
        from ..bench.plot_predictions import plot_comparisons
        plot_comparisons(found, plot)
    if json:
        print(jsonlib.dumps({"within_25_percent": close, "points": [
            {"source": c.source, "device": c.device, "case": c.case, "measured_ms": 1e3 * c.measured,
             "predicted_ms": 1e3 * c.predicted, "error": c.error, "bound_by": c.bound_by,
             "own_predicted_ms": c.ours and 1e3 * c.ours} for c in found]}, indent=1))
        return
    for source in dict.fromkeys(c.source for c in found):
        cases = [c for c in found if c.source == source]
        ours = ["peer /\nours"] if cases[0].ours else []
        table = new_table("case", "ms", "pred.", "bound\nby", *ours, title=source, text=("case", "bound\nby"))
        for c in cases:
            table.add_row(c.case, short(1e3 * c.measured), f"{c.error:+.0%}", c.bound_by, *([f"{c.speedup:.2f}"] if ours else []))
        print_table(table)
    print(f"{close} of {len(found)} published points are predicted within 25 %")
    print("pred.: off by so much; ours: moe_xe's kernel, by the same model")
