"""Activation problem -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools

from ..plan.block.activate import ActivateProblem, sub_groups
from .kernel_source import KernelSource
from .source import assemble

# as in sycl_kernels/kernels/activate.cpp
SIGNATURE = "pq" + "pq" + "pp" + "pq" + "pq" + "p" + "q"


@functools.lru_cache(maxsize=4096)
def activate_source(problem: ActivateProblem, isa: str | None) -> KernelSource:
    """The kernel for this problem; isa: the CPU's vector instructions, None for a GPU."""
    act = problem.activation
    pairs = "none" if not act.gated else "interleaved" if act.interleaved else "halves"
    dtypes = {name: getattr(problem, name) or problem.z for name in ("z", "g", "dz", "hs")}
    text = assemble("CPU" if isa else "GENERIC", [
        f"inline constexpr int row_size = {problem.row_size}, columns = {problem.columns};",
        "inline constexpr Dtype " + ", ".join(f"{name} = Dtype::{dtype.value}" for name, dtype in dtypes.items()) + ";",
        "inline constexpr Dtype input = z, output = hs;",
        _flags(has_dz=problem.dz, has_hs=problem.hs, has_dscale=problem.dscale, has_row_scales=problem.has_row_scales,
               has_row_pairs=problem.has_row_pairs, has_limit=act.limit is not None),
        f"inline constexpr Pairs pairs = Pairs::{pairs};",
        f"inline constexpr Act act = Act::{act.kind.value};",
        f"inline constexpr float act_alpha = {float(act.alpha)!r}f, act_limit = {float(act.limit or 0)!r}f;",
    ], [
        f"inline constexpr Isa isa = Isa::{isa};" if isa else f"inline constexpr int sub_groups = {sub_groups(problem)};",
    ], "activate.cpp")
    return KernelSource("activate", SIGNATURE, text)


def _flags(**flags) -> str:
    values = ", ".join(f"{name} = {str(bool(value)).lower()}" for name, value in flags.items())
    return f"inline constexpr bool {values};"
