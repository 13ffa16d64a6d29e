"""IPEX's class against routing and experts written out in float64; IPEX itself is never imported."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_xe import QuantizedWeight
from moe_xe.integrations.ipex import GatedMLPMOE
from tests.ops.block.case import HIDDEN, INTERMEDIATE


EXPERTS, TOP_K = 8, 3


def make(tokens=7, num_experts=EXPERTS, dtype=torch.float32):
    """hidden_states, router_logits (float32, so that no two are equal), W13 [E, 2I, H], W2 [E, H, I]."""
    return (torch.randn(tokens, HIDDEN).to(dtype), torch.randn(tokens, num_experts) * 2,
            (torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5).to(dtype),
            (torch.randn(num_experts, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5).to(dtype))


def choose(logits, scoring="softmax", groups=1, topk_groups=1, bias=None, renormalize=True):
    """Weights and ids, by torch alone."""
    scores = logits.double().softmax(-1) if scoring == "softmax" else logits.double().sigmoid()
    biased = scores if bias is None else scores + bias.double()
    grouped = biased.view(len(logits), groups, -1)
    best = grouped.amax(-1) if bias is None else grouped.topk(2).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(topk_groups).indices, True)
    ids = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, ids


def silu_and_mul(h):
    gate, up = h.chunk(2)
    return F.silu(gate) * up


def experts(x, w13, w2, weights, ids, act=silu_and_mul, b13=None, b2=None):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for weight, e in zip(weights[t], ids[t].tolist()):
            h = w13[e].double() @ x[t].double() + (0 if b13 is None else b13[e].double())
            out[t] += weight * (w2[e].double() @ act(h) + (0 if b2 is None else b2[e].double()))
    return out


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_top_k(scoring, renormalize):
    x, logits, w13, w2 = make()
    actual = GatedMLPMOE(w13, w2, use_prepack=True)(x, False, TOP_K, logits, renormalize, scoring_func=scoring)
    assert_close(actual, experts(x, w13, w2, *choose(logits, scoring, renormalize=renormalize)))


@pytest.mark.parametrize("with_bias", [True, False])
def test_grouped_top_k(with_bias):
    x, logits, w13, w2 = make()
    bias = torch.randn(EXPERTS) if with_bias else None
    actual = GatedMLPMOE(w13, w2)(x, True, TOP_K, logits, True, 2, 4, None, "sigmoid", "silu", bias)
    assert_close(actual, experts(x, w13, w2, *choose(logits, "sigmoid", 4, 2, bias)))


def test_gates_and_ups_apart_as_parameters():
    x, logits, w13, w2 = make()
    gate, up = (nn.Parameter(w.contiguous()) for w in w13.chunk(2, dim=1))
    module = GatedMLPMOE(gate, nn.Parameter(w2), up)
    assert_close(module(x, False, TOP_K, logits, True), experts(x, w13, w2, *choose(logits)))


@pytest.mark.parametrize("dtype, tolerance", [pytest.param(torch.float16, 2e-3, marks=pytest.mark.full), (torch.bfloat16, 1.6e-2)])
def test_sixteen_bits(dtype, tolerance):
    x, logits, w13, w2 = make(dtype=dtype)
    actual = GatedMLPMOE(w13, w2)(x, False, TOP_K, logits, True)
    assert actual.dtype == dtype
    assert_close(actual, experts(x, w13, w2, *choose(logits)), tolerance)


def test_custom_routing():
    x, logits, w13, w2 = make()

    def routing(hidden_states, gating_output, topk, renormalize):
        assert hidden_states is x and gating_output is logits and renormalize is False
        top = gating_output.topk(topk)
        return top.values.sigmoid(), top.indices

    module = GatedMLPMOE(w13, w2)
    weights, ids = routing(x, logits, TOP_K, False)
    assert_close(module(x, False, TOP_K, logits, False, custom_routing_function=routing), experts(x, w13, w2, weights, ids))
    weights = weights / weights.sum(-1, keepdim=True)
    assert_close(module(x, True, TOP_K, logits, True, custom_routing_function=routing), experts(x, w13, w2, weights, ids))


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.full)])
def test_swiglu_oai_with_biases(apart):
    x, logits, w13, w2 = make()
    x, b13, b2 = x * 4, torch.randn(EXPERTS, 2 * INTERMEDIATE), torch.randn(EXPERTS, HIDDEN)

    def act(h):
        gate, up = h.chunk(2) if apart else (h[0::2], h[1::2])
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    parts = w13.chunk(2, dim=1) if apart else (w13, None)
    module = GatedMLPMOE(parts[0], w2, parts[1], w13_bias=b13, w2_bias=b2)
    actual = module(x, False, TOP_K, logits, True, activation="swiglu_oai")
    assert_close(actual, experts(x, w13, w2, *choose(logits), act, b13, b2))


def test_ranks_sum_to_the_whole():
    x, logits, w13, w2 = make()
    parts = [GatedMLPMOE(w13[start:start + 4], w2[start:start + 4], experts_start_id=start)(x, False, TOP_K, logits, True)
             for start in (0, 4)]
    assert_close(sum(part.double() for part in parts), experts(x, w13, w2, *choose(logits)))


def test_quantised_weights():
    x, logits, w13, w2 = make()
    gate, up, w2 = (QuantizedWeight.quantize(w, "int8", (1, 16)) for w in (*w13.chunk(2, dim=1), w2))
    expected = experts(x, torch.cat((gate.dequantize(), up.dequantize()), 1), w2.dequantize(), *choose(logits))
    assert_close(GatedMLPMOE(gate, w2, up)(x, False, TOP_K, logits, True), expected)
    assert_close(GatedMLPMOE(QuantizedWeight.cat((gate, up), 1), w2)(x, False, TOP_K, logits, True), expected)


X, LOGITS, W13, W2 = make()
GATE = QuantizedWeight.quantize(W13[:, :INTERMEDIATE], "int8")
WRONG = {
    "scales": (dict(w1_scale_inv=torch.ones(8)), {}, ValueError, "w1_scale_inv must be None, got a Tensor: a quantised weight is a moe_xe.QuantizedWeight"),
    "scales of activations": (dict(a2_scale_inv=torch.ones(8)), {}, ValueError, "a2_scale_inv must be None"),
    "4 bits": (dict(is_int4=True), {}, ValueError, "is_int4 must be False, got True"),
    "int weights": (dict(W13=W13.int(), W2=W2.int()), {}, TypeError, "W13 must be bfloat16, float16 or float32, got torch.int32"),
    "another shape": (dict(W13=W13[:, :INTERMEDIATE]), {}, ValueError, r"W13 must be float32\[8, 74, 50\] for W2 float32\[8, 50, 37\], got float32\[8, 37, 50\]"),
    "ups twice": (dict(W3=W13[:, INTERMEDIATE:]), {}, ValueError, r"W13 must be float32\[8, 37, 50\]"),
    "W3 of another dtype": (dict(W13=W13[:, :INTERMEDIATE], W3=W13[:, INTERMEDIATE:].half()), {}, ValueError, "W3 must be float32"),
    "W3 that is not quantised": (dict(W13=GATE, W3=W13[:, INTERMEDIATE:]), {}, TypeError, "W3 must be quantised if W13 is, and only then, got float32"),
    "W2 has two dimensions": (dict(W2=W2[0]), {}, ValueError, "W2 must have 3 dimensions"),
    "negative start": (dict(experts_start_id=-1), {}, ValueError, "experts_start_id must be an int, at least 0, got -1"),
    "no groups": ({}, dict(use_grouped_topk=True), ValueError, "topk_group must be given with use_grouped_topk"),
    "another scoring": ({}, dict(scoring_func="max"), ValueError, "scoring_func must be softmax or sigmoid, got 'max'"),
    "another activation": ({}, dict(activation="gelu"), ValueError, "activation must be one of silu, swiglu_oai, got 'gelu'"),
    "logits of other tokens": ({}, dict(router_logits=LOGITS[:3]), ValueError,
                               r"router_logits must have one row for each of the 7 tokens, got float32\[3, 8\]"),
    "a bias of another shape": (dict(w2_bias=torch.zeros(8, INTERMEDIATE)), {}, ValueError, r"w2_bias must be \[8, 50\], got \[8, 37\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    init, call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        GatedMLPMOE(**dict(W13=W13, W2=W2) | init)(**dict(hidden_states=X, use_grouped_topk=False, top_k=TOP_K, router_logits=LOGITS,
                                                          renormalize=True) | call)


def test_ipex_is_never_imported():
    program = ("import sys; sys.modules['intel_extension_for_pytorch'] = None; import moe_xe.integrations.ipex, moe_xe.integrations.sglang, moe_xe.integrations.vllm; "
               "assert not {'sglang', 'sgl_kernel', 'vllm', 'vllm_xpu_kernels'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
