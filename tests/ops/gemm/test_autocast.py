"""Under torch.autocast grouped products are of its dtype, and their gradients of the operands'."""
import pytest
import torch

import moe_xe

from ..block.case import make, moved
from .test_gradients import ints


FORMS = {"grouped_gemm": ((9, 13), (4, 11, 13)), "grouped_mm": ((9, 13), (4, 13, 11)), "2D x 2D": ((11, 9), (9, 13)),
         "grouped_outer": ((9, 11), (9, 13)), "interface": ((9, 13), (4, 11, 13)), "dX": ((9, 11), (4, 11, 13)), "dW": ((9, 13), (9, 11))}


def product(form, x, y, device, **options):
    counts, ends = ints([0, 5, 1, 3], device), ints([0, 5, 6, 9], device)
    interface = moe_xe.grouped_gemm.interface
    return {"grouped_gemm": lambda: moe_xe.grouped_gemm(x, y, counts, **options), "grouped_mm": lambda: moe_xe.grouped_mm(x, y, offs=ends, **options),
            "2D x 2D": lambda: moe_xe.grouped_mm(x, y, offs=ends, **options), "grouped_outer": lambda: moe_xe.grouped_outer(x, y, counts, **options),
            "interface": lambda: interface.grouped_gemm(x, y, counts, 1), "dX": lambda: interface.grouped_gemm_dX(x, y, counts, 1),
            "dW": lambda: interface.grouped_gemm_dW(x, y, counts, 1)}[form]()


@pytest.mark.few(4)
@pytest.mark.parametrize("form", FORMS)
def test_operands_are_cast(form, device):
    """One of them float32, the other half: results and gradients are those of bfloat16 operands."""
    x, y = (torch.randn(shape, device=device) for shape in FORMS[form])
    x, y = x.requires_grad_(), y.half().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        out = product(form, x, y, device)
    x16, y16 = (t.detach().bfloat16().requires_grad_() for t in (x, y))
    expected = product(form, x16, y16, device)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    gradient = torch.randn_like(out)
    for value in (out, expected):
        value.backward(gradient)
    assert x.grad.dtype == torch.float32 and y.grad.dtype == torch.float16
    assert torch.equal(x.grad, x16.grad.float()) and torch.equal(y.grad, y16.grad.half())


def test_out_dtype_and_out_are_the_callers(device):
    x, y = (torch.randn(shape, device=device) for shape in FORMS["grouped_gemm"])
    expected = product("grouped_gemm", x.bfloat16(), y.bfloat16(), device, out_dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(product("grouped_gemm", x, y, device, out_dtype=torch.float32), expected)
        assert torch.equal(product("grouped_gemm", x, y, device, out=torch.full((9, 11), float("nan"), device=device)), expected)


def test_float64_is_refused_as_ever(device):
    x, y = (torch.randn(shape, dtype=torch.float64, device=device) for shape in FORMS["grouped_gemm"])
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(TypeError, match="w must be bfloat16, float16 or float32"):
        product("grouped_gemm", x, y, device)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_block_whose_backward_pass_is_in_the_region(lora, device):
    """Its own products are of what was cast in forward: gradients are those of a pass outside, to the bit."""
    block = {name: moved(value, device) for name, value in make(bias=(torch.bfloat16, torch.float32)).items()}
    names = [name for name, value in block.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    num_experts, n13, hidden = block["w13"].shape
    adapter = moe_xe.LoraAdapter(torch.randn(num_experts, 8, hidden, device=device), torch.randn(num_experts, n13, 8, device=device))

    def gradients(inside: bool):
        tensors = {name: block[name].detach().requires_grad_() for name in names}
        with torch.autocast(device.type, torch.bfloat16):
            out = moe_xe.lora_moe(**block | tensors, lora13=adapter) if lora else moe_xe.fused_moe(**block | tensors)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        return [tensor.grad for tensor in tensors.values()]

    for inside, outside in zip(gradients(True), gradients(False)):
        assert torch.equal(inside, outside)
