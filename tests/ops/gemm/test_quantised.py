"""grouped_gemm of quantised weights: operands, fusions, gradients and what torch sees. Kernels and formats: tests/kernels, tests/xe."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_xe
from moe_xe import QuantizedWeight
from moe_xe.bench.numerics import agrees, reference_grouped_gemm
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs
from moe_xe.plan.formats import FORMATS

BF16, F32 = torch.bfloat16, torch.float32
COUNTS = [3, 0, 11, 1]
K = 70


def quantised(experts: int, n: int, k: int, format: str, group=None, **options) -> QuantizedWeight:
    w = torch.randn(experts, n, k) / k**0.5
    return QuantizedWeight.quantize(w, format, FORMATS[format].group or group or (1, 32), **options)


def make(dtype=BF16, format="int4", n=37, k=K, counts=COUNTS, device="cpu", **options):
    w = quantised(len(counts), n, k, format, **options).to(device)
    rows = torch.tensor(counts, dtype=torch.int32, device=device)
    return torch.randn(sum(counts), k).to(dtype).to(device), w, rows


def expected(a, w, counts=COUNTS, bias=None):
    return reference_grouped_gemm(a.cpu(), w.to("cpu").dequantize(torch.float64), counts, bias)


@settings(settings.get_profile("compiling"), suppress_health_check=list(HealthCheck))
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=9), n=st.integers(1, 70), half_k=st.integers(1, 90),
       format=st.sampled_from(list(FORMATS)), symmetric=st.booleans(), rows=st.sampled_from([1, 3, 128]), columns=st.sampled_from([16, 48, 128]))
def test_any_shape(counts, n, half_k, format, symmetric, rows, columns, device):
    symmetric |= not FORMATS[format].can_have_zeros
    a, w, tokens_per_expert = make(BF16, format, n, 2 * half_k, counts, device, group=(rows, columns), symmetric=symmetric)
    out = torch.full((sum(counts), n), float("nan"), dtype=BF16, device=device)
    moe_xe.grouped_gemm(a, w, tokens_per_expert, out=out)
    assert agrees(out.cpu(), expected(a, w, counts), 2 * half_k)


def test_fusions(device):
    a, w, rows = make(device=device)
    bias, scales = torch.randn(4, 37, device=device), torch.rand(15, device=device)
    indices = torch.randint(0, 15, (15,), dtype=torch.int32, device=device)
    gathered = moe_xe.grouped_gemm(a, w, rows, bias=bias, gather_indices=indices, row_scales=scales, out_dtype=F32)
    want = expected(a[indices.long()], w, bias=bias.cpu()) * scales.cpu()[:, None]
    assert agrees(gathered.cpu(), want, K)
    places = torch.randperm(15, device=device).int()
    scattered = moe_xe.grouped_gemm(a, w, rows, scatter_indices=places)
    assert torch.equal(scattered[places.long()], moe_xe.grouped_gemm(a, w, rows))


def test_codes_of_some_experts_and_columns_of_a(device):
    """Slices: experts of codes, and rows of a matrix that is wider."""
    a, w, rows = make(counts=[0, *COUNTS, 0], device=device)
    wide = torch.full((15, 200), float("nan"), dtype=BF16, device=device)
    wide[:, 8:8 + K] = a
    assert torch.equal(moe_xe.grouped_gemm(wide[:, 8:8 + K], w[1:5], rows[1:5]), moe_xe.grouped_gemm(a, w, rows))
    apart = torch.zeros(6, 80, K // 2, dtype=torch.uint8, device=device)
    apart[:, :37] = w.codes
    spread = QuantizedWeight(apart[:, :37], w.scales, format="int4", group=(1, 32))
    assert torch.equal(moe_xe.grouped_gemm(a, spread, rows), moe_xe.grouped_gemm(a, w, rows))


def test_nothing_to_compute(device):
    a, w, rows = make(counts=[0, 0], device=device)
    assert moe_xe.grouped_gemm(a, w, rows).shape == (0, 37)
    a, w, rows = make(counts=[2, 3], k=0, device=device)
    assert (moe_xe.grouped_gemm(a, w, rows, bias=torch.ones(2, 37, device=device)) == 1).all()
    a, w, rows = make(device=device)
    assert moe_xe.grouped_gemm(a[:0], w[:0], rows[:0]).shape == (0, 37)


@pytest.mark.few(1)
@pytest.mark.parametrize("format", ["int4", "fp8_e4m3"])
def test_gradients(format, device):
    a, w, rows = make(F32, format, device=device)
    bias = torch.randn(4, 37, device=device)
    ours, theirs = ([tensor.detach().to(dtype).requires_grad_() for tensor in (a, bias)] for dtype in (F32, torch.float64))
    out = moe_xe.grouped_gemm(ours[0], w, rows, bias=ours[1])
    gradient = torch.randn_like(out)
    out.backward(gradient)
    dense = w.dequantize(torch.float64)
    of_rows = torch.repeat_interleave(torch.arange(4, device=device), rows)
    ((dense[of_rows] @ theirs[0][:, :, None])[..., 0] + theirs[1][of_rows]).backward(gradient.double())
    for got, want in zip(ours, theirs):
        assert (got.grad - want.grad).norm() <= 1e-5 * want.grad.norm()


def test_opcheck(device):
    a, w, rows = make(device=device)
    torch.library.opcheck(torch.ops.moe_xe.grouped_gemm, (*INPUTS.flatten(Inputs(a, w, rows)), BF16, "counts", "dynamic", "", False))


def test_fake_and_meta_tensors():
    with FakeTensorMode():
        w = QuantizedWeight(torch.empty(4, 96, 32, dtype=torch.uint8, device="xpu"),
                            torch.empty(4, 96, 2, dtype=torch.uint8, device="xpu"), format="mxfp4")
        a, rows = torch.empty(50, 64, dtype=BF16, device="xpu"), torch.empty(4, dtype=torch.int32, device="xpu")
        out = moe_xe.grouped_gemm(a, w, rows, out_dtype=F32)
    assert (out.shape, out.dtype, out.device.type) == ((50, 96), F32, "xpu")
    a, w, rows = make(device="meta")
    assert moe_xe.grouped_gemm(a, w, rows).shape == (15, 37)


def test_two_runs_are_equal(device):
    a, w, rows = make(counts=[400, 7], device=device)
    assert torch.equal(moe_xe.grouped_gemm(a, w, rows), moe_xe.grouped_gemm(a, w, rows, schedule="static"))


@pytest.mark.parametrize("format", ["fp8_e4m3", pytest.param("mxfp8", marks=pytest.mark.full)])
def test_a_code_that_is_no_number(format, device):
    """It is NaN in the column that it belongs to, and nowhere else."""
    a, w, rows = make(format=format, device=device)
    w.codes.view(torch.uint8)[2, 5, 9] = 0x7F
    out = moe_xe.grouped_gemm(a, w, rows)
    assert out[3:14, 5].isnan().all() and int(out.isnan().sum()) == 11


def test_a_scale_that_is_no_number(device):
    a, w, rows = make(format="mxfp4", device=device)
    w.scales.view(torch.uint8)[0, 36, 1] = 255
    out = moe_xe.grouped_gemm(a, w, rows)
    assert out[:3, 36].isnan().all() and int(out.isnan().sum()) == 3


def test_bad_input(device):
    a, w, rows = make(device=device)
    for arguments, error, message in (
            ((a[:, :64], w, rows), ValueError, "a and w must agree in K"),
            ((a.double(), w, rows), TypeError, "a must be bfloat16, float16 or float32, got torch.float64"),
            ((a, w[:3], rows), ValueError, "tokens_per_expert must have one entry for each of the 3 experts"),
            ((a, w.to("meta"), rows), ValueError, "all tensors must be on one device: .* w.codes is on meta"),
            ((a, w.codes, rows), TypeError, "w must be bfloat16, float16 or float32, got torch.uint8; a quantised weight is a moe_xe.Quant")):
        with pytest.raises(error, match=message):
            moe_xe.grouped_gemm(*arguments)
    with pytest.raises(ValueError, match="out must not share memory with w.scales"):
        moe_xe.grouped_gemm(a[:2], w[:1], rows[:1], out=w.scales.view(-1)[:2 * 37].view(2, 37), out_dtype=F32)


def test_memory_that_was_freed():
    a, w, rows = make()
    freed = QuantizedWeight(w.codes, w.scales.clone(), format="int4", group=(1, 32))
    freed.scales.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="w.scales must have memory for all of its elements"):
        moe_xe.grouped_gemm(a, freed, rows)
