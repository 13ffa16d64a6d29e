"""Counts the K loops of sub-group shapes from Intel's offline compiler: the table behind plan/model/cost.py.

    python -m moe_xe.isa.counts moe_xe/plan/model/data/instructions
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..jit.shipped_sources import sources_dir
from ..jit.source import KERNEL_NAME, generate
from ..plan.formats import Codes, Quantization, ScaleType
from ..plan.gemm.config import Schedule, XeConfig
from ..plan.model.cost import STEP_BYTES, variant_of
from ..plan.problem import Activation, Dtype, GroupedGemmProblem, RowScale, WeightLayout
from ..plan.xe.rules import sub_group_reason
from . import ocloc, spirv
from .kernels import LARGE_GRF
from .listing import summarize

TARGETS = ("bmg", "pvc")
WIDTH, SUB_GROUPS = 256, 32
K = 17 * 128                    # whole rounds of the loop, of four steps or eight, and four steps outside it (xe/k_loop.hpp)
OTHER_STEPS = 4                 # of codes: what is no whole round

# rows and columns of a sub-group whose sums leave room for operands in 256 registers
SHAPES = {WeightLayout.enk: ((16, 8), (16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64)),
          WeightLayout.ekn: ((8, 16), (8, 32), (8, 64), (16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64))}

# The same of codes, whose operands should serve many tokens, or stream past few
CODE_SHAPES = {WeightLayout.enk: ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (32, 64), (64, 16), (64, 32)),
               WeightLayout.ekn: ((8, 32), (8, 64), (16, 32), (16, 64), (32, 32), (32, 64))}
QUANTIZATIONS = {Codes.int4: Quantization(Codes.int4, ScaleType.f16, 1, 128), Codes.e2m1: Quantization(Codes.e2m1, ScaleType.e8m0, 1, 32),
                 Codes.int8: Quantization(Codes.int8, ScaleType.f16, 1, 128), Codes.e4m3: Quantization(Codes.e4m3, ScaleType.f32, 128, 128)}

HEADER = """\
# Instructions of one sub-group, bf16, or i8: int8 rows and weights, counted in machine code: layout + fusions -> rows x columns -> counts.
# step: dpas, messages and other instructions for each 64 bytes along K; tile: instructions of the loop over tiles outside that over K.
# Written by: python -m moe_xe.isa.counts moe_xe/plan/model/data/instructions
"""

# What is counted for both layouts: plain and gathered rows, and the two GEMMs of a block.
FUSIONS = ({}, {"gathered": True}, {"gathered": True, "slots": 8, "activation": Activation()},
           {"scattered": True, "row_scale": RowScale.outputs})


def problems() -> list[GroupedGemmProblem]:
    dense = [GroupedGemmProblem(2 * WIDTH, K, Dtype.bf16, Dtype.bf16, layout, **fusions) for layout in SHAPES for fusions in FUSIONS]
    codes = [replace(problem, quantization=quantization) for quantization in QUANTIZATIONS.values() for problem in dense
             if problem.weights is WeightLayout.enk or not problem.pairs]
    int8 = [replace(problem, input=Dtype.i8, k=2 * K, quantization=Quantization(Codes.int8, ScaleType.f32, 1, 2 * K)) for problem in dense
            if problem.weights is WeightLayout.enk]
    return dense + codes + int8


def shapes(problem: GroupedGemmProblem) -> tuple[tuple[int, int], ...]:
    return (CODE_SHAPES if _converts(problem) else SHAPES)[problem.weights]


def _converts(problem: GroupedGemmProblem) -> bool:
    return problem.quantization is not None and problem.input is not Dtype.i8


def count(problem: GroupedGemmProblem, shape: tuple[int, int], targets: tuple[str, ...] = TARGETS) -> Iterator[dict]:
    """One entry of the table for each target. Raises RuntimeError for a shape that spills."""
    rows, columns = shape
    step_k = STEP_BYTES // problem.input.size
    config = XeConfig(heights=(SUB_GROUPS * columns // WIDTH * rows,), tile_width=WIDTH, raster_group=8, min_fill_eighths=7,
                      schedule=Schedule.dynamic, sub_group_rows=(rows,), sub_group_columns=(columns,), prefetch_distance=3)
    root = sources_dir()
    image = spirv.compile_to_spirv(generate(problem, config), [f"-I{root / 'include'}", f"-I{root}"])
    for target in targets:
        summary = summarize(ocloc.build(image, target, LARGE_GRF), KERNEL_NAME)
        loop, = summary.loops
        if summary.spill_bytes:
            raise RuntimeError(f"{target} {variant_of(problem)} {shape}: {summary.spill_bytes} bytes of spills")
        steps = loop.macs // (rows * columns * step_k)
        yield {"dpas": loop.dpas / steps, "messages": loop.messages / steps,
               "other": (loop.instructions - loop.dpas - loop.messages) / steps,
               "tile": round(loop.around - loop.instructions * (K * 2 // STEP_BYTES % steps if _converts(problem) else OTHER_STEPS) / steps)}


def main(folder: Path) -> None:
    """Writes a file for each target."""
    table: dict[str, dict[str, dict[str, dict]]] = {target: {} for target in TARGETS}
    for problem in problems():
        for shape in shapes(problem):
            if sub_group_reason(problem, *shape) is None:
                for target, entry in zip(TARGETS, count(problem, shape)):
                    table[target].setdefault(variant_of(problem), {})["{}x{}".format(*shape)] = entry
    for target, variants in table.items():
        lines = []
        for variant, shapes in variants.items():
            lines += [f"{variant}:", *(f"  {shape}: {{{', '.join(f'{name}: {value:g}' for name, value in entry.items())}}}"
                                       for shape, entry in shapes.items())]
        (folder / f"{target}.yaml").write_text(HEADER + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
