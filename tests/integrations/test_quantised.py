"""Weights of a dtype that is not supported: every way in names the weights, and says what is."""
from __future__ import annotations

import pytest
import torch

import moe_xe
from moe_xe.integrations.ipex import GatedMLPMOE
from moe_xe.integrations.vllm import XpuFusedMoe
from moe_xe.nn import Experts, LoraExperts, Qwen3MoeBlock

E, H, I, T, K = 4, 16, 8, 5, 2
DTYPES = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def message(name: str, dtype: torch.dtype) -> str:
    return f"^{name} must be bfloat16, float16 or float32, got {dtype}; a quantised weight is a moe_xe.QuantizedWeight"


def weights(*shape, dtype=torch.float32):
    return torch.randint(0, 8, shape).to(dtype)


def routing():
    return torch.rand(T, K), torch.randint(E, (T, K))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("which", ["w13", "w2", "both"])
@dtypes
def test_fused_moe_and_lora_moe(dtype, which, autocast):
    """autocast does not turn them into numbers, which mean nothing without scales."""
    x, shapes = torch.randn(T, H), {"w13": (E, 2 * I, H), "w2": (E, H, I)}
    w = {name: weights(*shape, dtype=dtype if which in (name, "both") else torch.bfloat16) for name, shape in shapes.items()}
    lora13 = moe_xe.LoraAdapter(torch.randn(E, 2, H), torch.randn(E, 2 * I, 2), 1.0)
    for states in (x, x.bfloat16(), x.to(dtype)):
        for op in (moe_xe.fused_moe, lambda *arguments: moe_xe.lora_moe(*arguments, lora13=lora13)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with pytest.raises(TypeError, match=message("w13" if which == "both" else which, dtype)):
                    op(states, w["w13"], w["w2"], *routing())


@dtypes
def test_gemms(dtype):
    w, counts = weights(E, 24, H, dtype=dtype), torch.tensor([1, 2, 0, 2], dtype=torch.int32)
    for states in (torch.randn(T, H), torch.randn(T, H).to(dtype)):
        with pytest.raises(TypeError, match=message("w", dtype)):
            moe_xe.grouped_gemm(states, w, counts)
        with pytest.raises(TypeError, match=message("mat_b", dtype)):
            moe_xe.grouped_mm(states, w.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
        with pytest.raises(TypeError, match=message("W", dtype)):
            moe_xe.grouped_gemm.interface.grouped_gemm(states, w, counts, topk=1)


def quantise(experts, name, dtype):
    parameter = getattr(experts, name)
    setattr(experts, name, torch.nn.Parameter(weights(*parameter.shape, dtype=dtype), requires_grad=False))


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@dtypes
def test_blocks_and_adapters(dtype, name):
    block = Qwen3MoeBlock(H, I, E, K)
    lora = LoraExperts(Experts(E, H, I), 2)
    for experts in (block.experts, lora.base_layer):
        quantise(experts, name, dtype)
    with pytest.raises(TypeError, match=message(f"experts.{name}", dtype)):
        block(torch.randn(1, T, H))
    with pytest.raises(TypeError, match=message(f"experts.{name}", dtype)):
        LoraExperts(block.experts, 2)
    with pytest.raises(TypeError, match=message(f"experts.{name}", dtype)):
        lora(torch.randn(T, H), *routing())
    with pytest.raises(TypeError, match=f"^dtype must be bfloat16, float16 or float32, got {dtype}"):
        Experts(E, H, I, dtype=dtype)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@dtypes
def test_transformers_experts(dtype, name):
    pytest.importorskip("transformers", minversion="5.23")
    from tests.integrations.test_transformers import HIDDEN, INKLING2, QWEN3, _experts, _routing, _run
    ids, topk_weights = _routing(T)
    for family in (QWEN3, INKLING2):
        experts = _experts(*family)
        quantise(experts, name, dtype)
        with pytest.raises(TypeError, match=message(f"experts.{name}", dtype)):
            _run(experts, "moe_xe", torch.randn(T, HIDDEN), ids, topk_weights)


@dtypes
def test_other_libraries_classes(dtype):
    good, bad = weights(E, 2 * I, H), weights(E, 2 * I, H, dtype=dtype)
    down, bad_down = weights(E, H, I), weights(E, H, I, dtype=dtype)
    for name, arguments in (("W13", (bad, down)), ("W2", (good, bad_down)), ("W13", (bad, bad_down)),
                            ("W3", (good[:, :I], down, bad[:, I:]))):
        with pytest.raises(TypeError, match=message(name, dtype)):
            GatedMLPMOE(*arguments)
    for name, w13, w2 in (("w13", bad, down), ("w2", good, bad_down), ("w13", bad, bad_down)):
        with pytest.raises(TypeError, match=message(name, dtype)):
            XpuFusedMoe(w13.transpose(1, 2), None, None, w2.transpose(1, 2), None, None, K, "silu", E)
