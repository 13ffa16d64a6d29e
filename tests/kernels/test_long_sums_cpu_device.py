"""The error of long float32 sums on the CPU device: it does not grow with the length as one running sum's does."""
from dataclasses import replace

import pytest
import torch

import moe_xe
from moe_xe import runtime
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

ISA = runtime.cpu_isa() if runtime.cpu_isa() in ("baseline", "avx2") else "avx512"     # sums of float32 products
SUMMED_STEPS = 256              # of cpu/micro_kernel.hpp
COUNTS = [40, 3, 1]             # packed, and in place
COLUMNS = 400                   # so many errors that their RMS is known to a twentieth, also of one row


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the error over RMS, in float32 roundings (2^-24)."""
    error = (result.double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    return float(error * 2**24)


def limit(terms: int, block: int) -> float:
    """A running sum of n random terms is off by sqrt(n) * 0.3 roundings: of a block's terms, then of all blocks' sums. A third
    more for chance; one running sum of 16384 terms is at 38 where the limit is 7."""
    return 1.33 * 0.3 * (block + terms / block)**0.5


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype, layout, k_block", [
    (torch.float32, "enk", 512), pytest.param(torch.float32, "ekn", 4096, marks=pytest.mark.full),
    pytest.param(torch.float32, "enk", 16384, marks=pytest.mark.full),
    (torch.bfloat16, "ekn", 512), pytest.param(torch.float16, "enk", 512, marks=pytest.mark.full)], ids=str)
def test_grouped_gemm(dtype, layout, k_block):
    k = 16384 + 24
    a, w = torch.randn(sum(COUNTS), k).to(dtype), torch.randn(len(COUNTS), COLUMNS, k).to(dtype)
    if layout == "ekn":
        w = w.mT.contiguous().mT
    config = replace(cpu_config(GroupedGemmProblem(COLUMNS, k, Dtype.f32, Dtype.f32), ISA), k_block=k_block)
    out = torch.full((sum(COUNTS), COLUMNS), float("nan"))
    moe_xe.grouped_gemm(a, w, torch.tensor(COUNTS), out=out, config=config)
    for expert, (rows, of_a) in enumerate(zip(out.split(COUNTS), a.split(COUNTS))):
        assert relative_error(rows, of_a.double() @ w[expert].double().T) < limit(k, SUMMED_STEPS)


@pytest.mark.parametrize("dtype, row_block", [pytest.param(torch.float32, 128, marks=pytest.mark.full), (torch.bfloat16, 4096)], ids=str)
def test_grouped_outer(dtype, row_block):
    rows = 65536 + 100
    left, right = torch.randn(rows, 20).to(dtype), torch.randn(rows, 24).to(dtype)
    config = replace(cpu_outer_config(ISA), row_block=row_block)
    out = torch.full((1, 20, 24), float("nan"))
    moe_xe.grouped_outer(left, right, torch.tensor([rows]), out=out, config=config)
    assert relative_error(out[0], left.double().T @ right.double()) < limit(rows, min(row_block, SUMMED_STEPS))
