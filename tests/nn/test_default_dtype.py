"""Blocks, adapters and Transformers' experts under another default dtype: results and gradients are those under float32."""
from __future__ import annotations

import copy

import pytest
import torch

from moe_xe.nn import DeepseekV3Block, GptOssBlock, Llama4Block, LoraExperts, MixtralBlock, Qwen3MoeBlock

pytest.importorskip("transformers", minversion="5.23")

from tests.integrations.test_transformers import GPT_OSS, INKLING2, QWEN3, _experts, _routing, _run  # noqa: E402
from tests.ops.block.case import HIDDEN, INTERMEDIATE  # noqa: E402


TOP_K = 3
SIZES = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=8, top_k=TOP_K)
SHARED = dict(shared_intermediate_size=INTERMEDIATE + 4)
BLOCKS = {
    "qwen3_moe": lambda **options: Qwen3MoeBlock(**SIZES, **options),
    "mixtral": lambda **options: MixtralBlock(**SIZES, **options),
    "gpt_oss": lambda **options: GptOssBlock(**SIZES, **options),
    "deepseek_v3": lambda **options: DeepseekV3Block(**SIZES, **SHARED, num_groups=4, topk_groups=2, **options),
    "llama4": lambda **options: Llama4Block(**SIZES, **SHARED, **options),
}
defaults = pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)


@pytest.fixture
def under(default):
    """Calls a function under this default dtype."""
    def call(function, *args, **kwargs):
        torch.set_default_dtype(default)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)

    yield call
    torch.set_default_dtype(torch.float32)


def _results(module, x, *routing, grad_out):
    """The outputs, and the gradients of x and all parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    outputs = module(x, *routing)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs[0].view(grad_out.shape).backward(grad_out)
    return [*(output.detach() for output in outputs), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def _same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and torch.equal(result, value)


def _randomized(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape) / tensor.shape[-1]**0.5)
    return module


@defaults
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, default, under):
    block = under(BLOCKS[name], dtype=torch.float32)
    plain = BLOCKS[name](dtype=torch.float32)
    assert {key: value.dtype for key, value in block.state_dict().items()} == {key: value.dtype for key, value in plain.state_dict().items()}
    _randomized(block)
    x, grad_out = torch.randn(1, 7, HIDDEN), torch.randn(1, 7, HIDDEN)
    _same(under(_results, block, x, grad_out=grad_out), _results(block, x, grad_out=grad_out))


@defaults
@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("llama4", marks=pytest.mark.full)])
def test_adapters(name, default, under):
    block = _randomized(BLOCKS[name](dtype=torch.float32))
    block.experts = under(LoraExperts, block.experts, 8)
    _randomized(block.experts.lora_A), _randomized(block.experts.lora_B)
    assert all(parameter.dtype == torch.float32 for parameter in block.parameters())
    x, grad_out = torch.randn(1, 7, HIDDEN), torch.randn(1, 7, HIDDEN)
    _same(under(_results, block, x, grad_out=grad_out), _results(block, x, grad_out=grad_out))
    other = copy.deepcopy(block.experts)
    assert torch.equal(under(other.merge).gate_up_proj, block.experts.merge().gate_up_proj)


@defaults
@pytest.mark.parametrize("module, name", [QWEN3, GPT_OSS, pytest.param(*INKLING2, marks=pytest.mark.full)])
def test_transformers_experts(module, name, default, under):
    experts, (ids, weights) = _experts(module, name).requires_grad_(), _routing(7)
    x = torch.randn(7, experts.down_proj.shape[1 if not experts.is_transposed else 2])
    experts.config._experts_implementation = "moe_xe"
    grad_out = torch.randn(x.shape)
    _same(under(_results, experts, x, ids, weights, grad_out=grad_out), _results(experts, x, ids, weights, grad_out=grad_out))


@pytest.mark.parametrize("default", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full), torch.float64], ids=str)
def test_made_and_run_with_the_default(default, under):
    """Weights of the default dtype: float64 is refused by the weights' name."""
    (ids, weights), x = _routing(7), torch.randn(7, 64, dtype=default)
    experts = under(_experts, *QWEN3, dtype=default)
    block = under(BLOCKS["qwen3_moe"])
    assert experts.down_proj.dtype == block.experts.down_proj.dtype == default
    if default == torch.float64:
        with pytest.raises(TypeError, match="experts.gate_up_proj must be bfloat16, float16 or float32, got torch.float64"):
            under(_run, experts, "moe_xe", x, ids, weights)
        return
    out, eager = (under(_run, experts, way, x, ids, weights) for way in ("moe_xe", "eager"))
    exact = _run(experts.float(), "eager", x.float(), ids, weights)
    error, eager_error = ((result - exact).norm() / exact.norm() for result in (out, eager))
    assert out.dtype == default and error < 1.1 * eager_error
    with torch.no_grad():
        assert block(torch.randn(1, 4, HIDDEN, dtype=default)).dtype == default
