"""The token sort's and the combine's BMG machine code, executed by xesim; memory around the operands is unmapped there."""
from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from moe_xe.isa import ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.kernel_source import KernelSource
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.jit.token_sort_source import combine_source, sort_source
from moe_xe.ops.checks import DTYPES
from moe_xe.ops.routing.token_sort import Routing, SortedTokens
from moe_xe.plan.problem import Dtype
from moe_xe.plan.block.token_sort import CombineProblem, SortProblem, combine_columns, combine_groups, sort_groups

from ..ops.routing.test_token_sort import (BF16, F16, F32, KINDS, POISON, local_experts, make_routing, make_rows, reference_combine,
                                   reference_sort, strided)
from .case import missing

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


@cache
def build(source: KernelSource, device: str = "bmg"):
    root = sources_dir()
    return ocloc.build(spirv.compile_to_spirv(source.text, [f"-I{root / 'include'}", f"-I{root}"]), device)


def run(source: KernelSource, groups: int, group_size: int, arguments: list, seed: int) -> None:
    from xesim import Kernel
    stats = Kernel(build(source), source.name).launch(groups * group_size, group_size, arguments, seed=seed)
    assert not stats.warnings, stats.warnings


def stored(tensor: torch.Tensor | None) -> np.ndarray | None:
    """The memory below a strided view, in place."""
    if tensor is None:
        return None
    whole = tensor if tensor._base is None else tensor._base
    return whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]).numpy()


def rows(tensor: torch.Tensor | None) -> list:
    return [stored(tensor), np.int64(0 if tensor is None else tensor.stride(0))]


def ids(routing: Routing) -> list:
    mapped = routing.expert_map
    return [*rows(routing.topk_ids), stored(mapped), np.int32(0 if mapped is None else len(mapped))]


def sort_problem(routing: Routing, zero_access: int = 0) -> SortProblem:
    of = lambda tensor: None if tensor is None else DTYPES[tensor.dtype]
    return SortProblem(routing.top_k, routing.num_shared, routing.id_bits, routing.expert_map is not None,
                       of(routing.topk_weights), of(routing.shared_weights), zero_access)


def check_sort(routing: Routing, seed: int, out: torch.Tensor | None = None, zero_access: int = 0) -> None:
    tokens_per_expert = np.full(routing.num_shared + routing.num_experts, POISON, "i4")
    row_pairs, row_scales = np.full(routing.num_pairs, POISON, "i4"), np.full(routing.num_pairs, np.nan, "f4")
    counters = np.full(3, POISON, "i4")
    element = 0 if out is None else out.element_size()
    out_row = [np.int64(0)] * 2 if out is None else [np.int64(out.stride(0) * element), np.int64(out.shape[1] * element)]
    run(sort_source(sort_problem(routing, zero_access), is_cpu=False),
        *sort_groups(routing.num_tokens, routing.num_experts, is_cpu=False, cores=20),
        [*ids(routing), *rows(routing.topk_weights), *rows(routing.shared_weights), np.float32(routing.routed_scaling_factor),
         tokens_per_expert, row_pairs, row_scales, counters, np.int32(3), stored(out), *out_row,
         np.int32(routing.num_tokens), np.int32(routing.num_experts)], seed)
    for got, wanted, name in zip((tokens_per_expert, row_pairs, row_scales), reference_sort(routing), SortedTokens._fields):
        assert np.array_equal(got, wanted.numpy()), name
    assert (counters == 0).all()


@pytest.mark.few(3)
@pytest.mark.parametrize("num_tokens, num_experts, gap, dropped", [
    (1, 5, 0, 0.0), (7, 3, 1, 0.5), (150, 20, 3, 0.2), (531, 8, 0, 0.1), (40, 2, 0, 1.0)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sort(kind, num_tokens, num_experts, gap, dropped):
    check_sort(make_routing(kind, num_tokens, num_experts, gap=gap, dropped=dropped), seed=num_tokens)


def test_sort_nothing():
    check_sort(make_routing(KINDS[3], 0, 4), seed=0)


@pytest.mark.parametrize("dtype, columns, gap, access", [
    *(pytest.param(*case, marks=pytest.mark.full) for case in ((BF16, 5, 0, 2), (F32, 7, 1, 4))), (BF16, 24, 8, 16)])
def test_rows_of_dropped_tokens_become_zero(dtype, columns, gap, access):
    routing = make_routing(KINDS[0], 60, 5, dropped=0.4)
    out = strided(torch.full((60, columns), POISON, dtype=dtype), gap)
    before = out._base.clone()
    check_sort(routing, 0, out, access)
    before[:, :columns][local_experts(routing)[:, 0] == routing.num_experts] = 0
    assert torch.equal(out._base, before)


# y's gap behind each row, which may be read if `whole`; the output's gap; what a lane loads and stores. Vectors that are whole, end behind
# the last column, or are not aligned; parts of a work-group, and several for a token
@pytest.mark.few(5)
@pytest.mark.parametrize("hidden_size, y_gap, out_gap, whole, accesses", [
    (16, 16, 8, False, (16, 16)), (1100, 0, 0, False, (8, 8)), (1100, 4, 0, True, (16, 8)), (333, 0, 0, False, (0, 0)),
    (334, 2, 0, True, (16, 4)), (333, 3, 0, True, (16, 0)), (5, 11, 11, True, (16, 0)), (4112, 0, 0, False, (16, 16))])
@pytest.mark.parametrize("kind, dtype, out_dtype", [
    (KINDS[1], F32, BF16), (KINDS[2], BF16, BF16), (KINDS[4], BF16, F16), (KINDS[0], F16, F32)], ids=str)
def test_combine(kind, dtype, out_dtype, hidden_size, y_gap, out_gap, whole, accesses):
    """accesses: bytes of a load and of a store of two-byte elements, 0 for single elements."""
    routing = make_routing(kind, 9, 7, gap=1, dropped=0.3)
    y = strided(make_rows(routing, hidden_size, dtype, "cpu"), y_gap)
    out = strided(torch.full((9, hidden_size), POISON, dtype=out_dtype), out_gap)
    columns, stored = combine_columns((0, y.stride(0), hidden_size + y_gap * whole), DTYPES[dtype], (0, out.stride(0), hidden_size),
                                      DTYPES[out_dtype])
    if dtype is BF16:
        assert (columns, stored) == tuple(max(access // 2, 1) for access in accesses)
    problem = CombineProblem(hidden_size, DTYPES[dtype], DTYPES[out_dtype], routing.top_k, routing.num_shared, routing.id_bits,
                             routing.expert_map is not None, columns, stored)
    run(combine_source(problem, isa=None), *combine_groups(problem, 9, is_cpu=False, cores=20),
        [*rows(y), *ids(routing), *rows(out), np.int32(9), np.int32(7)], seed=hidden_size)
    assert torch.equal(out, reference_combine(y, routing, out_dtype))
    assert (out._base[:, hidden_size:] == POISON).all()


SORTS = [SortProblem(8, weights=Dtype.bf16), SortProblem(1, 0, 64, True, zero_access=16),
         SortProblem(64, 1, 64, True, Dtype.bf16, Dtype.bf16)]
COMBINES = [CombineProblem(2880, Dtype.bf16, Dtype.bf16, 8, columns=8, stored=8),
            CombineProblem(2880, Dtype.f32, Dtype.f32, 64, 1, 64, True, columns=4, stored=4),
            CombineProblem(333, Dtype.f16, Dtype.f16, 7, columns=8)]


@pytest.mark.few(2)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("problem", SORTS + COMBINES, ids=[f"{type(p).__name__}-{p.top_k}" for p in SORTS + COMBINES])
def test_no_spills(problem, device):
    source = sort_source(problem, is_cpu=False) if isinstance(problem, SortProblem) else combine_source(problem, isa=None)
    summary = summarize(build(source, device), source.name)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())


@pytest.mark.parametrize("device", ["bmg", pytest.param("pvc", marks=pytest.mark.full)])
def test_combine_loads_each_row_once_at_full_width(device):
    for dtype in (Dtype.bf16, Dtype.f32):
        problem = CombineProblem(2048, dtype, Dtype.bf16, 8, columns=16 // dtype.size, stored=16 // dtype.size)
        kinds = summarize(build(combine_source(problem, isa=None), device), "combine").message_kinds
        assert kinds["load.ugm.d32x4.a64"] == 8 and kinds[f"store.ugm.d32x{8 // dtype.size}.a64"] == 1
