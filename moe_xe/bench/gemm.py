"""The grouped GEMM against torch's own ways to do it."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

import moe_xe

from ..plan.formats import CHECKPOINTS
from ..timing import interleaved_medians
from . import workloads
from .checkpoint import as_in_checkpoint
from .numerics import agrees, reference_grouped_gemm
from .roofline import gemm_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Result:
    """One case. *_ms: median milliseconds. speedup: torch's faster path / moe_xe. gbytes_per_s: least bytes / time.

    weights: "dense", or the name of their format; torch's ways, and moe_xe_dense, then have the dequantised numbers."""
    model: str
    n: int
    k: int
    tokens: int
    rows: int
    dtype: str
    weights: str
    moe_xe_ms: float
    moe_xe_dense_ms: float | None
    grouped_mm_ms: float
    mm_loop_ms: float
    speedup: float
    gflops: float
    gbytes_per_s: float
    correct: bool

    def as_dict(self) -> dict:
        return asdict(self)


def mm_loop(a: torch.Tensor, w: torch.Tensor, counts: list[int], out: torch.Tensor) -> None:
    """One torch.mm an expert that has rows."""
    begin = 0
    for expert, rows in enumerate(counts):
        if rows:
            torch.mm(a[begin:begin + rows], w[expert].T, out=out[begin:begin + rows])
        begin += rows


def run_case(model: workloads.Model, gemm: int, tokens: int, dtype_name: str, device: torch.device, seconds: float,
             autotune: bool = False, weights: str = "dense") -> Result:
    """Times one of the model's two GEMMs (`gemm` 0 or 1); gpt-oss-20b's prefill uses the recorded rows of its first layer.

    weights: "dense" or one of `CHECKPOINTS`."""
    generator = torch.Generator().manual_seed(tokens)
    counts = workloads.routed_rows(model, tokens, generator)
    if model.name == "gpt-oss-20b" and tokens >= 1024:
        recorded = workloads.recorded_layers()[0]
        counts = [round(rows * tokens * model.top_k / sum(recorded)) for rows in recorded]
    n, k = model.gemms()[gemm]
    dtype = DTYPES[dtype_name]
    a = torch.randn(sum(counts), k, dtype=dtype, device=device)
    w = torch.randn(model.num_experts, n, k, dtype=dtype, device=device).mul_(k**-0.5)
    codes, weight_bytes = w, dtype.itemsize
    if weights != "dense":
        checkpoint = CHECKPOINTS[weights]
        codes = as_in_checkpoint(w, checkpoint)
        w, weight_bytes = codes.dequantize(dtype), checkpoint.weight_bytes
    rows = torch.tensor(counts, dtype=torch.int32, device=device)
    ours_of = {"a": a}
    if weights != "dense" and checkpoint.int8_rows:     # quantised before; torch's ways have these numbers
        ours_of["a"], ours_of["a_scales"] = moe_xe.quantize_rows(a)
        a = (ours_of["a"] * ours_of["a_scales"][:, None]).to(dtype)
    offs = rows.cumsum(0, dtype=torch.int32)
    ours, dense, loop = (torch.full((sum(counts), n), float("nan"), dtype=dtype, device=device) for _ in range(3))
    calls = {"moe_xe": lambda: moe_xe.grouped_gemm(**ours_of, w=codes, tokens_per_expert=rows, out=ours, autotune=autotune),
             **({} if codes is w else {"moe_xe_dense": lambda: moe_xe.grouped_gemm(a, w, rows, out=dense, autotune=autotune)}),
             "grouped_mm": lambda: torch.nn.functional.grouped_mm(a, w.transpose(1, 2), offs=offs),
             "mm_loop": lambda: mm_loop(a, w, counts, loop)}
    medians = interleaved_medians(calls, device, seconds)
    # the first and the last expert with rows, both ends of the queue
    correct = bool(torch.isfinite(ours).all())
    active = [expert for expert, r in enumerate(counts) if r]
    for expert in {active[0], active[-1]}:
        begin = sum(counts[:expert])
        part = slice(begin, begin + counts[expert])
        correct &= agrees(ours[part], reference_grouped_gemm(a[part], w[expert:expert + 1], [counts[expert]]), k)
    flops = 2 * sum(counts) * n * k
    return Result(model.name, n, k, tokens, sum(counts), dtype_name, weights, *(
        1e3 * medians[name] if name in medians else None for name in ("moe_xe", "moe_xe_dense", "grouped_mm", "mm_loop")),
                  min(medians["grouped_mm"], medians["mm_loop"]) / medians["moe_xe"], flops / medians["moe_xe"] / 1e9,
                  gemm_bytes(counts, n, k, dtype.itemsize, dtype.itemsize, weight_bytes) / medians["moe_xe"] / 1e9, correct)
