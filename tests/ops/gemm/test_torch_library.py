"""The ops as torch sees them: schema, fake tensors, torch.compile, and dispatch on XPU."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import moe_xe
from moe_xe import device as devices
from moe_xe.bench.numerics import agrees, reference_grouped_gemm
from moe_xe.ops.gemm.grouped_gemm import INPUTS, Inputs

from ..tiles import K, N
from .test_grouped_gemm import COUNTS, make


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.full)])
def test_opcheck(dtype, device):
    a, w, rows, b = make(COUNTS, N, K, dtype, device, dtype)
    indices = torch.arange(sum(COUNTS), dtype=torch.int32, device=device).flip(0)
    scales = torch.rand(sum(COUNTS), device=device)
    for inputs in (Inputs(a, w, rows), Inputs(a, w, rows, b, indices), Inputs(a, w, rows, b, None, indices, scales)):
        arguments = INPUTS.flatten(inputs)
        torch.library.opcheck(torch.ops.moe_xe.grouped_gemm, (*arguments, dtype, "counts", "dynamic", "", False))
        out = torch.empty(sum(COUNTS), N, dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.moe_xe.grouped_gemm_out, (*arguments, out, "counts", "dynamic", ""))


def test_fake_xpu_tensors_reach_the_op():
    """On a build of torch without XPU: checks, dispatch and the output's shape, dtype and device."""
    with FakeTensorMode():
        a = torch.empty(50, 64, dtype=torch.bfloat16, device="xpu")
        w = torch.empty(4, 96, 64, dtype=torch.bfloat16, device="xpu")
        rows = torch.empty(4, dtype=torch.int32, device="xpu")
        out = moe_xe.grouped_gemm(a, w, rows, out_dtype=torch.float32)
        mm = moe_xe.grouped_mm(a, w.transpose(1, 2), offs=rows)
    assert (out.shape, out.dtype, out.device.type) == ((50, 96), torch.float32, "xpu")
    assert (mm.shape, mm.dtype, mm.device.type) == ((50, 96), torch.bfloat16, "xpu")


def test_both_ops_have_an_xpu_kernel():
    for op in ("moe_xe::grouped_gemm", "moe_xe::grouped_gemm_out"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "XPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def test_xpu_tensors_run_on_torchs_current_stream(monkeypatch):
    """The stream's .sycl_queue is the address of a queue: a CPU one here, in the place of the GPU's."""
    from moe_xe import runtime

    queue = runtime.Queue.create("cpu")
    asked = []

    class Stream:
        sycl_queue = queue.address

    monkeypatch.setattr(torch.xpu, "current_stream", lambda device: asked.append(device) or Stream)
    found = devices.queue_for(torch.device("xpu", 0))
    assert asked == [torch.device("xpu", 0)] and found.context_id == queue.context_id


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_fullgraph(backend, device):
    a, w, rows, b = make(COUNTS, N, K, torch.float32, device, torch.float32)

    @torch.compile(fullgraph=True, backend=backend)
    def block(a, w, rows, b):
        return torch.relu(moe_xe.grouped_gemm(a, w, rows, bias=b)) + 1

    out = block(a, w, rows, b)
    assert agrees(out - 1, reference_grouped_gemm(a, w, COUNTS, b).relu(), 2 * K)


def test_gradients(device):
    """Gathered or scattered rows, factors and bias, against float64 autograd."""
    a, w, rows, b = make(COUNTS, N, K, torch.float32, device, torch.float32)
    total = sum(COUNTS)
    scales = torch.rand(total, device=device)
    expert = torch.repeat_interleave(torch.arange(len(COUNTS), device=device), rows)
    pairs = torch.randint(0, 3 * 50, (total,), dtype=torch.int32, device=device)
    places = torch.randperm(total, device=device).int()
    for first, options in ((a[:50], dict(gather_indices=pairs, gather_divisor=3)), (a, dict(scatter_indices=places))):
        ours = [t.clone().requires_grad_() for t in (first, w, b, scales)]
        out = moe_xe.grouped_gemm(ours[0], ours[1], rows, bias=ours[2], row_scales=ours[3], **options)
        gradient = torch.randn_like(out)
        out.backward(gradient)
        theirs = [t.detach().double().requires_grad_() for t in ours]
        source = theirs[0][pairs.long() // 3] if "gather_indices" in options else theirs[0]
        expected = (torch.einsum("rk,rnk->rn", source, theirs[1][expert]) + theirs[2][expert]) * theirs[3][:, None]
        if "scatter_indices" in options:
            expected = torch.zeros_like(expected).index_copy(0, places.long(), expected)
        expected.backward(gradient.double())
        for mine, reference in zip(ours, theirs):
            assert agrees(mine.grad, reference.grad, 4 * max(COUNTS))     # whose sums are twice as large as the others' mean
