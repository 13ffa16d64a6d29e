"""What rounding the experts' rows before they are summed (`y_dtype` of `fused_moe`) adds to a block's error.

    python -m moe_xe.bench.rounding

Blocks of published models at an eighth of their sizes, random weights and tokens, against float64 sums of the same rounded
inputs, on the CPU device.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .block_models import FAMILIES, Family, make_inputs, make_weights, reference_of, run_fused, scaled
from .numerics import difference

SCALE, TOKENS = 8, 256
TOP_K = (1, 2, 4, 6, 8)     # of the first family, beside every family's own
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Error:
    """rms, largest: of the errors, over the RMS of the reference. calc_diff: as in numerics.py."""
    rms: float
    largest: float
    calc_diff: float

    @classmethod
    def of(cls, result: torch.Tensor, reference: torch.Tensor) -> Error:
        found = difference(result, reference)
        rms = (result.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
        return cls(float(rms), found.max_error, found.calc_diff)


def errors(family: Family, dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Error]:
    """Of the float64 result rounded to the type once, and of the block with y in float32 and in the type."""
    cpu = torch.device("cpu")
    weights, inputs = make_weights(family, dtype, cpu), make_inputs(family, tokens, dtype, cpu)
    reference = reference_of(family, weights, inputs.hidden_states.double(), inputs.topk_weights.double(), inputs.topk_ids)
    results = {"rounding": reference.to(dtype)} | {
        name: run_fused(family, weights, inputs, y_dtype=y_dtype) for name, y_dtype in (("float32", torch.float32), ("own", dtype))}
    return {name: Error.of(result, reference) for name, result in results.items()}


def cases() -> Iterator[tuple[str, Family]]:
    """Names, and families at a fraction of their sizes: one with each number of experts a token, then all with their own."""
    first = scaled(next(iter(FAMILIES.values())), SCALE)
    for top_k in TOP_K:
        yield f"{first.model.name}, top {top_k}", replace(first, model=replace(first.model, top_k=top_k))
    for family in list(FAMILIES.values())[1:]:
        yield f"{family.model.name}, top {family.model.top_k}", scaled(family, SCALE)


def main() -> None:
    print("errors over the result's RMS (x 1e-3): RMS / largest; calc_diff (x 1e-6)\n")
    print("| dtype | block | result rounded once | y in float32 | y in the dtype | RMS, ratio |\n|---|---|---|---|---|---|")
    for dtype in DTYPES:
        for name, family in cases():
            torch.manual_seed(0)
            found = errors(family, dtype)
            cells = [f"{1e3 * e.rms:.3g} / {1e3 * e.largest:.3g}; {1e6 * e.calc_diff:.3g}" for e in found.values()]
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {' | '.join(cells)} | "
                  f"{found['own'].rms / found['float32'].rms:.2f} |", flush=True)


if __name__ == "__main__":
    main()
