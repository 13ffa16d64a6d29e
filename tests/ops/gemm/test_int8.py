"""grouped_gemm of int8 codes on both sides, against the numbers that they stand for, in float64."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe import QuantizedWeight, grouped_gemm, quantize_rows
from moe_xe.bench.numerics import agrees, reference_grouped_gemm
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs

BF16, F32 = torch.bfloat16, torch.float32
COUNTS = [3, 0, 11, 1]
K = 70


def make(device, n=37, k=K, counts=COUNTS, group_rows=1, **options) -> dict:
    """Arguments by name."""
    rows = sum(counts)
    weight = QuantizedWeight.quantize(torch.randn(len(counts), n, k) / k**0.5, "int8", (group_rows, k), **options)
    return dict(a=torch.randint(-127, 128, (rows, k), dtype=torch.int8).to(device), a_scales=(0.01 + torch.rand(rows) / 100).to(device),
                w=weight.to(device), tokens_per_expert=torch.tensor(counts, dtype=torch.int32, device=device))


def expected(arguments: dict, counts=COUNTS, bias=None) -> torch.Tensor:
    a, a_scales, w = (arguments[name].to("cpu") for name in ("a", "a_scales", "w"))
    return reference_grouped_gemm(a.double() * a_scales[:, None].double(), w.dequantize(torch.float64), counts, bias)


@settings(settings.get_profile("compiling"), suppress_health_check=list(HealthCheck))
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=9), n=st.integers(1, 70), k=st.integers(1, 180),
       group_rows=st.sampled_from([1, 3, 128]))
def test_any_shape(counts, n, k, group_rows, device):
    arguments = make(device, n, k, counts, group_rows)
    out = torch.full((sum(counts), n), float("nan"), dtype=BF16, device=device)
    grouped_gemm(**arguments, out=out)
    assert agrees(out.cpu(), expected(arguments, counts), k)


def test_rows_by_rank_and_in_batches(device):
    """Rows of two ranks, and of the batched layout, are the rows of plain counts in other places."""
    arguments = make(device)
    plain, table = grouped_gemm(**arguments), torch.tensor([[2, 0, 5, 0], [1, 0, 6, 1]], dtype=torch.int32)
    experts = torch.arange(4).repeat(2).repeat_interleave(table.flatten().long())
    order = experts.argsort(stable=True).to(device)     # the sorted rows' places among those by rank
    places = order.argsort()
    by_rank = {name: arguments[name][places] for name in ("a", "a_scales")}
    assert torch.equal(grouped_gemm(**arguments | by_rank | dict(tokens_per_expert=table.to(device)))[order], plain)
    batched = {name: arguments[name].new_zeros(4, 13, *arguments[name].shape[1:]) for name in ("a", "a_scales")}
    for name, values in batched.items():
        for part, rows in zip(values, arguments[name].split(COUNTS)):
            part[:len(rows)] = rows
    out = grouped_gemm(**arguments | batched)
    assert torch.equal(torch.cat([part[:count] for part, count in zip(out, COUNTS)]), plain)


@pytest.mark.few(1)
@pytest.mark.parametrize("scale_dtype", [BF16, torch.float16, F32], ids=str)
def test_fusions(scale_dtype, device):
    arguments = make(device, scale_dtype=scale_dtype)
    bias, scales = torch.randn(4, 37, device=device), torch.rand(15, device=device)
    indices = torch.randint(0, 30, (15,), dtype=torch.int32, device=device)
    gathered = grouped_gemm(**arguments, bias=bias, gather_indices=indices, gather_divisor=2, row_scales=scales, out_dtype=F32)
    source = indices.long() // 2
    rows = arguments | {name: arguments[name][source] for name in ("a", "a_scales")}
    assert agrees(gathered.cpu(), expected(rows, bias=bias.cpu()) * scales.cpu()[:, None], K)
    places = torch.randperm(15, device=device).int()
    scattered = grouped_gemm(**arguments, scatter_indices=places)
    assert torch.equal(scattered[places.long()], grouped_gemm(**arguments)) and scattered.dtype == BF16


def test_quantised_rows_come_near_the_rows(device):
    x = torch.randn(15, K, dtype=BF16, device=device)
    codes, scales = quantize_rows(x)
    arguments = make(device)
    near = grouped_gemm(**arguments | dict(a=codes, a_scales=scales), out_dtype=F32)
    exact = grouped_gemm(x, arguments["w"], arguments["tokens_per_expert"], out_dtype=F32)
    error = (near - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-3 < error < 2e-2


def test_nothing_to_compute(device):
    assert grouped_gemm(**make(device, counts=[0, 0])).shape == (0, 37)
    empty = make(device, counts=[2, 3])
    w = QuantizedWeight(torch.empty(2, 37, 0, dtype=torch.int8, device=device), torch.empty(2, 37, 0, device=device), format="int8", group=(1, K))
    out = grouped_gemm(**empty | dict(a=empty["a"][:, :0], w=w), bias=torch.ones(2, 37, device=device))
    assert (out == 1).all()


def test_the_tuner_measures_them(device, fresh_tuner, launched):
    arguments = make(device)
    tuned = grouped_gemm(**arguments, autotune=True)
    (line,) = launched()
    assert line.origin == "tuned" and line.problem.startswith("i8->bf16 int8 weights") and agrees(tuned.cpu(), expected(arguments), K)


def test_opcheck(device):
    arguments = make(device)
    inputs = Inputs(arguments["a"], arguments["w"], arguments["tokens_per_expert"], a_scales=arguments["a_scales"])
    torch.library.opcheck(torch.ops.moe_xe.grouped_gemm, (*INPUTS.flatten(inputs), BF16, "counts", "dynamic", "", False))


def test_bad_input(device):
    arguments = make(device)
    a, w, scales = (arguments[name] for name in ("a", "w", "a_scales"))
    grouped = QuantizedWeight.quantize(torch.randn(4, 37, K), "int8", (1, 32)).to(device)
    zeros = QuantizedWeight.quantize(torch.randn(4, 37, K), "int8", (1, K), symmetric=False).to(device)
    int4 = QuantizedWeight.quantize(torch.randn(4, 37, K), "int4", (1, K)).to(device)
    long = QuantizedWeight(torch.zeros(1, 15, 65537, dtype=torch.int8, device=device), torch.ones(1, 15, 1, device=device), format="int8", group=(1, 65537))
    right = r"w must be int8 codes \[E, N, K\] without zeros, each row with one scale, beside a in int8; got "
    for changes, error, message in (
            (dict(a=a.float()), TypeError, "a must be int8 with a_scales, got torch.float32"),
            (dict(a_scales=None), TypeError, "a must be bfloat16, float16 or float32, got torch.int8"),
            (dict(a_scales=scales[:5]), ValueError, "a_scales must have one entry for each of the 15 rows of a, got 5"),
            (dict(a_scales=scales.double()), TypeError, "a_scales must be float32, got torch.float64"),
            (dict(a_scales=scales.to("meta")), ValueError, "all tensors must be on one device: .* a_scales is on meta"),
            (dict(w=w.dequantize()), TypeError, "w must be a QuantizedWeight in int8 beside a in int8, got Tensor"),
            (dict(w=grouped), ValueError, right + r"int8 codes \[E, N, K\] in groups of \(1, 32\)"), (dict(w=zeros), ValueError, right + ".* with zeros"),
            (dict(w=int4), ValueError, right + "int4"), (dict(w=w.mT.contiguous(), a=a[:, :37]), ValueError, right + r"int8 codes \[E, K, N\]"),
            (dict(w=long, a=long.codes[0]), ValueError, r"w must have at most K = 65536 beside a in int8, got \[1, 15, 65537\]"),
            (dict(bias=torch.zeros(4, 37, device=device, requires_grad=True)), ValueError, "bias must not require a gradient"),
            (dict(out_dtype=torch.int8), TypeError, "out_dtype must be bfloat16, float16 or float32, got torch.int8")):
        with pytest.raises(error, match=message):
            grouped_gemm(**arguments | changes)
