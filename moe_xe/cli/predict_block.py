"""What `moe-xe predict --block` prints: the predicted time of whole blocks, and published layers beside them."""
import json as jsonlib

import typer

from .tables import new_table, print_table, short


def _as_dict(prediction) -> dict:
    return {"ms": 1e3 * prediction.seconds, "launches": prediction.launches, "y_bytes": prediction.y_bytes,
            "parts_ms": {part: 1e3 * seconds for part, seconds in prediction.parts.items()}}


def predict_blocks(device, models, token_counts, dtype, layout, y, weights, quantization, int8_rows: bool, json: bool) -> None:
    """Of each model, for each number of tokens."""
    from ..bench.predictions import predict_model_block

    if device.architecture is None:
        raise typer.BadParameter(f"--block is for Xe GPUs, got {device.name}", param_hint="--device")
    blocks = [(model, tokens, predict_model_block(model, tokens, device, dtype, layout, y, quantization, int8_rows))
              for model in models for tokens in token_counts]
    if json:
        print(jsonlib.dumps({"predicted": True, "device": device.name, "dtype": dtype.value, "layout": layout.value, "weights": weights, "blocks": [
            {"model": model.name, "tokens": tokens} | _as_dict(block) for model, tokens, block in blocks]}, indent=1))
        return
    print(f"PREDICTED, not measured: {device.name}, {dtype.value}, {layout.value}, {weights} weights; milliseconds, launches and routing included")
    for model in models:
        parts = {name: part for name, part in _PARTS.items() if any(part in block.parts for found, _, block in blocks if found is model)}
        table = new_table("tokens", "launches", *parts, "all", title=model.name)
        for found, tokens, block in blocks:
            if found is model:
                table.add_row(str(tokens), str(block.launches), *(short(1e3 * block.parts.get(part, 0.0)) for part in parts.values()),
                              short(1e3 * block.seconds))
        print_table(table)


_PARTS = {"launch": "launches", "route": "route", "sort": "sort", "int8": "quantize", "GEMM 1": "gate_up", "GEMM 2": "down", "sum": "combine"}


def check_blocks(y, json: bool) -> None:
    """Beside other libraries' published layers."""
    from ..bench.published import block_comparisons, mean_speedup

    found = list(block_comparisons(y))
    if json:
        print(jsonlib.dumps({"predicted": True, "mean_speedup": mean_speedup(found), "layers": [
            {"source": c.source, "device": c.device, "case": c.case, "measured_ms": 1e3 * c.measured, "speedup": c.speedup} | _as_dict(c.ours)
            for c in found]}, indent=1))
        return
    for source in dict.fromkeys(c.source for c in found):
        table = new_table("case", "peer ms", "ours, pred.", "peer / ours", title=source, text=("case",))
        for c in (c for c in found if c.source == source):
            table.add_row(c.case, short(1e3 * c.measured), short(1e3 * c.ours.seconds), f"{c.speedup:.2f}")
        print_table(table)
    print(f"peer / ours, geometric mean of {len(found)} layers: {mean_speedup(found):.2f} (theirs measured, ours PREDICTED)")
