"""Transformers' experts on moe_xe, traced before they ever ran."""
from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import moe_xe
from tests.integrations.test_transformers import GPT_OSS, HIDDEN, INKLING2, NEMOTRON, QWEN3, _experts, _routing, _run


experts_classes = pytest.mark.parametrize("module, name", [QWEN3, GPT_OSS, NEMOTRON, INKLING2])


def _untried(module, name):
    experts = _experts(module, name)
    experts.config._experts_implementation = "moe_xe"
    return experts


def _inputs(num_tokens=7):
    ids, weights = _routing(num_tokens)
    return torch.randn(num_tokens, HIDDEN), ids, weights


def _check(run, experts):
    inputs = _inputs()
    torch.testing.assert_close(run(*inputs), _run(experts, "eager", *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@experts_classes
def test_export(module, name, strict):
    experts = _untried(module, name)
    _check(torch.export.export(experts, _inputs(), strict=strict).module(), experts)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@experts_classes
def test_make_fx(module, name, mode):
    experts = _untried(module, name)
    parameters = dict(experts.named_parameters())

    def call(parameters, *inputs):
        return torch.func.functional_call(experts, parameters, inputs)

    graph = make_fx(call, tracing_mode=mode)(parameters, *_inputs())
    _check(lambda *inputs: graph(parameters, *inputs), experts)


@pytest.mark.parametrize("parameters", ["fake", "real"])
@experts_classes
def test_fake_tensors(module, name, parameters):
    mode = FakeTensorMode(allow_non_fake_inputs=parameters == "real")
    experts = _untried(module, name)
    inputs = [mode.from_tensor(tensor) for tensor in _inputs()]
    weights = {key: mode.from_tensor(parameter) if parameters == "fake" else parameter for key, parameter in experts.named_parameters()}
    with mode:
        out = torch.func.functional_call(experts, weights, tuple(inputs))
    assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype and isinstance(out, torch._subclasses.FakeTensor)
    _check(experts, experts)      # what was found out among fake tensors holds for real ones


def test_no_grad_of_an_op_in_a_compiled_region():
    x, ids, weights = _inputs(5)
    w13, w2 = torch.randn(8, 2 * 32, HIDDEN) / 8, torch.randn(8, HIDDEN, 32) / 8

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x):
        return torch.no_grad()(moe_xe.fused_moe)(x, w13, w2, weights, ids)

    torch.testing.assert_close(call(x), moe_xe.fused_moe(x, w13, w2, weights, ids))
