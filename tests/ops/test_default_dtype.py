"""torch.set_default_dtype says nothing about tensors that moe_xe makes: exact values under each, of float32 operands."""
import pytest
import torch

import moe_xe

F32 = dict(dtype=torch.float32)


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str, autouse=True)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


def leaf(value, *shape, device):
    return torch.full(shape, value, **F32, device=device).requires_grad_()


def ints(*values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.full), True])
def test_grouped_gemm(scaled, device):
    a, w, bias, scales = (leaf(1.0, *shape, device=device) for shape in ((1, 1), (1, 1, 1), (1, 1), (1,)))
    out = moe_xe.grouped_gemm(a, w, ints(1, device=device), bias=bias, row_scales=scales if scaled else None,
                              gather_indices=ints(0, device=device))
    assert out.dtype == torch.float32 and out.item() == 2
    out.sum().backward()
    assert (a.grad.item(), w.grad.item(), bias.grad.item()) == (1, 1, 1) and (not scaled or scales.grad.item() == 2)


def test_grouped_mm(device):
    a, b, bias = (leaf(1.0, *shape, device=device) for shape in ((3, 1), (2, 1, 1), (2, 1)))
    out = moe_xe.grouped_mm(a, b, offs=ints(1, 3, device=device), bias=bias)
    out.sum().backward()
    assert out.flatten().tolist() == [2, 2, 2] and bias.grad.flatten().tolist() == [1, 2] and b.grad.flatten().tolist() == [1, 2]
    assert moe_xe.grouped_mm(leaf(1.0, 2, 3, 1, device=device), b).flatten().tolist() == [1] * 6


def test_grouped_outer(device):
    left, right = leaf(2.0, 2, 1, device=device), leaf(3.0, 2, 1, device=device)
    out = moe_xe.grouped_outer(left, right, ints(2, device=device), gather_indices_right=ints(0, 0, device=device))
    out.sum().backward()
    assert out.item() == 12 and left.grad.flatten().tolist() == [3, 3] and right.grad.flatten().tolist() == [4, 0]


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_blocks(lora, on_input, device):
    """x = 1, relu2: act(w13 x + b13) w2 + b2, weighted. LoRA turns w13 = 1 to 2. Weights scale either the result or x."""
    x, w13, w2, weights, b13, b2 = (leaf(value, *shape, device=device) for value, shape in (
        (1.0, (1, 1)), (1.0, (1, 1, 1)), (3.0, (1, 1, 1)), (0.5, (1, 1)), (1.0, (1, 1)), (2.0, (1, 1))))
    ids, options = ints(0, device=device)[None], dict(activation="relu2", b13=b13, b2=b2, weight_on_input=on_input)
    adapter = moe_xe.LoraAdapter(leaf(1.0, 1, 1, 1, device=device), leaf(1.0, 1, 1, 1, device=device), 1.0)
    if lora:
        out = moe_xe.lora_moe(x, w13, w2, weights, ids, lora13=adapter, **options)
    else:
        out = moe_xe.fused_moe(x, w13, w2, weights, ids, **options)
    out.sum().backward()
    w, s = 2 if lora else 1, 0.5
    z = w * s + 1 if on_input else w + 1
    after = 1 if on_input else s
    assert out.dtype == torch.float32 and out.item() == (3 * z**2 + 2) * after
    dz = 6 * z * after
    assert x.grad.item() == dz * w * (s if on_input else 1) and w13.grad.item() == dz * (s if on_input else 1)
    assert w2.grad.item() == z**2 * after and b13.grad.item() == dz and b2.grad.item() == after
    assert weights.grad.item() == (dz * w if on_input else 3 * z**2 + 2)
    if lora:
        assert adapter.a.grad.item() == adapter.b.grad.item() == w13.grad.item()


def test_route(device):
    logits = leaf(0.0, 1, 2, device=device)
    weights, ids = moe_xe.route(logits, top_k=1, scoring="sigmoid")
    assert weights.dtype == torch.float32 and weights.item() == 0.5
    weights.sum().backward()
    assert logits.grad[0, ids.item()].item() == 0.25


def test_sort_and_combine(device):
    ids = torch.tensor([[1, 0], [1, 5]], device=device)
    tokens_per_expert, pairs, scales = moe_xe.sort_tokens(ids, 2)
    assert tokens_per_expert.tolist() == [1, 2] and pairs.tolist() == [1, 0, 2, -1] and scales.dtype == torch.float32
    assert scales.tolist() == [1, 1, 1, 0]
    y = torch.tensor([[1.0], [2.0], [4.0], [8.0]], **F32, device=device)
    out = moe_xe.combine(y, ids, 2)
    assert out.dtype == torch.float32 and out.tolist() == [[3], [4]]
