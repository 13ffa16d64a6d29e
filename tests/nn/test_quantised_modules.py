"""Modules with quantised weights: their state, moves and casts, and LoRA on top."""
from __future__ import annotations

import copy

import pytest
import torch

from moe_xe import QuantizedWeight, fused_moe
from moe_xe.nn import Experts, LoraExperts
from tests.ops.block.case import assert_right, random_ids, reference

SIZES = dict(num_experts=5, hidden_size=50, intermediate_size=38)
BF16 = torch.bfloat16


def experts(**options) -> Experts:
    module = Experts(**SIZES, dtype=BF16, **options)
    module.reset_parameters(std=0.2)
    return module


def tokens():
    return torch.randn(7, 50).to(BF16), torch.rand(7, 3), random_ids(7, 3, 5)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed):
    module, (x, weights, ids) = experts(transposed=transposed).quantize("int4", (1, 16)), tokens()
    w13, w2 = module.gate_up_proj.weight, module.down_proj.weight
    assert w13.shape == ((5, 50, 76) if transposed else (5, 76, 50)) and w13.transposed == transposed
    assert_right(module(x, weights, ids), reference(x, w13, w2, weights, ids, weight_layout="ekn" if transposed else "enk"))


def test_state_dict_and_casts():
    module, arguments = experts(bias=True).quantize("fp8_e4m3", (16, 16)), tokens()
    torch.nn.init.normal_(module.gate_up_proj_bias), torch.nn.init.normal_(module.down_proj_bias)
    out = module(*arguments)
    assert module.state_dict().keys() == {*(f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in ("codes", "scales")),
                                          "gate_up_proj_bias", "down_proj_bias"}
    other = experts(bias=True).quantize("fp8_e4m3", (16, 16))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(*arguments), out)
    module.half()
    assert (module.gate_up_proj.codes.dtype, module.gate_up_proj.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert module.gate_up_proj_bias.dtype == torch.float16
    assert torch.equal(copy.deepcopy(other)(*arguments), out)
    assert other.to("meta").gate_up_proj.codes.is_meta


def test_weights_that_are_given():
    module = experts()
    w, w2 = (QuantizedWeight.quantize(dense.detach(), "int4", (1, 16)) for dense in (module.gate_up_proj, module.down_proj))
    assert module.set_quantized(gate_up_proj=w).gate_up_proj.weight.codes is w.codes and module.down_proj.dtype == BF16
    with pytest.raises(ValueError, match=r"down_proj must be \[5, 50, 38\], got QuantizedWeight\(int4 \[5, 76, 50\]"):
        module.set_quantized(down_proj=w)
    with pytest.raises(TypeError, match="down_proj must be a QuantizedWeight, got Parameter"):
        module.set_quantized(down_proj=module.down_proj)
    with pytest.raises(ValueError, match="gate_up_proj must be dense"):
        module.quantize("mxfp4")
    with pytest.raises(TypeError, match="gate_up_proj must be dense to be initialised"):
        module.reset_parameters()
    module.set_quantized(down_proj=w2)(*tokens())


@pytest.mark.full
def test_adapters():
    module, (x, weights, ids) = experts().quantize("mxfp4"), tokens()
    lora = LoraExperts(module, r=4, dtype=BF16)
    for b in lora.lora_B.values():
        torch.nn.init.normal_(b, std=0.1)
    out = lora(x, weights, ids)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters())
    w13, w2 = (w.weight.dequantize(torch.float64) + adapter.scaling * adapter.b.double() @ adapter.a.double()
               for w, adapter in zip((module.gate_up_proj, module.down_proj), lora.adapters().values()))
    expected = reference(x, w13.detach(), w2.detach(), weights, ids)
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()
    assert {"gate_up_proj.codes", "gate_up_proj.scales", "lora_A.gate_up_proj"} <= lora.state_dict().keys()
    with pytest.raises(TypeError, match="gate_up_proj must be dense to be merged into"):
        lora.merge()


def test_an_error_leaves_the_module_as_it_was():
    odd = Experts(5, 50, 33, dtype=BF16)        # down_proj's K cannot lie in pairs
    with pytest.raises(ValueError, match="w must have an even K for int4"):
        odd.quantize("int4", (1, 16))
    assert odd.gate_up_proj.dtype == odd.down_proj.dtype == BF16
    module = experts()
    w = QuantizedWeight.quantize(module.gate_up_proj.detach(), "mxfp4")
    with pytest.raises(ValueError, match=r"down_proj must be \[5, 50, 38\]"):
        module.set_quantized(w, w)
    assert module.gate_up_proj.dtype == BF16


def test_state_dicts_of_other_dtypes_are_refused():
    """torch would cast scales, and codes as if they were numbers."""
    module = experts().quantize("int4", (1, 16))
    for format, options in (("int4", dict(scale_dtype=BF16)), ("int8", {})):
        with pytest.raises(RuntimeError, match=r"gate_up_proj.(codes|scales) must be torch.(uint8|float32) for QuantizedWeight\(int4"):
            module.load_state_dict(experts().quantize(format, (1, 16), **options).state_dict())


def test_int8_activations():
    module = experts(activations="int8").quantize("int8", (1, 50))
    x, weights, ids = torch.randn(400, 50).to(BF16), torch.rand(400, 3), random_ids(400, 3, 5)
    w13, w2 = module.gate_up_proj.weight, module.down_proj.weight
    assert torch.equal(module(x, weights, ids), fused_moe(x, w13, w2, weights, ids, activations="int8"))
    with pytest.raises(ValueError, match="activations must be None or \"int8\", got 8"):
        experts(activations=8)
