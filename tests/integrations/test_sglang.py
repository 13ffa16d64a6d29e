"""The SGLang adapter against loops in float64 over what its weights mean."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_xe.integrations.sglang import fused_experts

from tests.integrations.quantised_weights import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, numbers_of, routing, small_weight
from tests.integrations.test_vllm import ACTIVATIONS, assert_close, gated, make, reference, swiglu_oai


def of_int4(n, k, zeros=False):
    weight = small_weight("uint4" if zeros else "int4", n, k, (1, 35), torch.bfloat16, zeros)
    return weight.codes.view(torch.int8), dict(scale=weight.scales, zp=weight.zeros), weight


def of_mxfp4(n, k):
    weight = small_weight("mxfp4", n, k, None, torch.uint8)
    return weight.codes, dict(scale=weight.scales), weight


def of_fp8(n, k):
    weight = small_weight("fp8_e4m3", n, k, (n, k))
    return weight.codes, dict(scale=weight.scales.flatten()), weight


def of_block_fp8(n, k):
    weight = small_weight("fp8_e4m3", n, k, (128, 128))
    return weight.codes, dict(scale=weight.scales), weight


FORMATS = {"int4": (of_int4, dict(use_int4_w4a16=True)), "int4 with zero points": (lambda n, k: of_int4(n, k, True), dict(use_int4_w4a16=True)),
           "mxfp4": (of_mxfp4, dict(use_mxfp4_w4a16=True)), "fp8": (of_fp8, dict(use_fp8_w8a8=True)),
           "block fp8": (of_block_fp8, dict(use_fp8_w8a8=True, block_shape=[128, 128]))}


def case(format, dtype=torch.float32, halves=2):
    """Arguments of fused_experts, and those of the reference."""
    make, options = FORMATS[format]
    x, (topk_weights, topk_ids) = torch.randn(TOKENS, HIDDEN).to(dtype), routing()
    arguments, dense = dict(hidden_states=x, topk_weights=topk_weights, topk_ids=topk_ids, **options), []
    for i, (n, k) in enumerate([(halves * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)], 1):
        tensor, parts, weight = make(n, k)
        bias = torch.randn(EXPERTS, n)
        arguments |= {f"w{i}": tensor, f"b{i}": bias} | {f"w{i}_{part}": value for part, value in parts.items()}
        dense += [numbers_of(weight).mT, bias]
    return arguments, (x, *dense, topk_weights, topk_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, dtype):
    arguments, expected = case(format, dtype)
    assert_close(fused_experts(**arguments), reference(*expected, ACTIVATIONS["silu"]))


ACTS = {
    "gpt-oss": (dict(gemm1_alpha=1.702, gemm1_limit=7.0), 2, swiglu_oai),
    "gelu": (dict(activation="gelu"), 2, ACTIVATIONS["gelu_tanh"]),
    "relu2": (dict(activation="relu2"), 1, ACTIVATIONS["relu2_no_mul"]),
    "DeepSeek-V4": (dict(swiglu_limit=0.75), 2, gated(F.silu, 0.75)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("act", ACTS)
def test_activations_and_scaling_in_place(act):
    options, halves, function = ACTS[act]
    arguments, expected = case("mxfp4", halves=halves)
    wanted = 2.5 * reference(*expected, function)
    assert_close(fused_experts(**arguments, **options, routed_scaling_factor=2.5, inplace=True), wanted)
    assert_close(arguments["hidden_states"], wanted)


def test_weights_of_activations_dtype():
    x, w1, b1, w2, b2, topk_weights, topk_ids = expected = make()
    out = fused_experts(x, w1.mT.contiguous(), w2.mT.contiguous(), topk_weights, topk_ids, b1, b2)
    assert_close(out, reference(*expected, ACTIVATIONS["silu"]))


INT4, MXFP4 = case("int4 with zero points")[0], case("mxfp4")[0]
WRONG = {
    "act-order": (INT4, dict(w1_g_idx_perm=torch.arange(HIDDEN).expand(EXPERTS, -1)), ValueError, "w1_g_idx_perm must be None, got a Tensor: act-order is not"),
    "quantised activations": (INT4, dict(a2_scale=torch.ones(1)), ValueError, "a2_scale must be None, got a Tensor: quantised activations are not"),
    "rows": (INT4, dict(no_combine=True), ValueError, "no_combine must be False, got True"),
    "two formats": (INT4, dict(use_mxfp4_w4a16=True), ValueError, "use_int4_w4a16 must be False with use_mxfp4_w4a16, got True"),
    "no format": (INT4, dict(use_int4_w4a16=False), ValueError, "w1_scale must be None for a weight of no format, got a Tensor"),
    "blocks of int4": (INT4, dict(block_shape=[128, 128]), ValueError, r"block_shape must be None without use_fp8_w8a8, got \[128, 128\]"),
    "no scale": (INT4, dict(w2_scale=None), TypeError, "w2_scale must be a torch.Tensor with use_int4_w4a16, got None"),
    "zero points of mxfp4": (MXFP4, dict(w1_zp=INT4["w1_zp"]), ValueError, "w1_zp must be None with use_mxfp4_w4a16, got a Tensor"),
    "zero points' dtype": (INT4, dict(w1_zp=INT4["w1_zp"].float()), TypeError, "w1, w1_scale, w1_zp: zeros must have the scales' dtype"),
    "float scales of mxfp4": (MXFP4, dict(w2_scale=MXFP4["w2_scale"].float()), TypeError, "w2, w2_scale: scales must be .* for mxfp4, got torch.float32"),
    "float weights": (MXFP4, dict(w2=torch.ones(EXPERTS, HIDDEN, 35)), TypeError, "w2, w2_scale: weights must be uint8 or int8, got torch.float32"),
    "weights without experts": (MXFP4, dict(w1=MXFP4["w1"][0]), ValueError, r"w1 must have 3 dimensions \[E, N, K / 2\]"),
    "a gate too many": (MXFP4, dict(activation="relu2"), ValueError, r"w1 must be \[3, 70, 140\] for w2 QuantizedWeight.* and relu2, got Qu.* \[3, 140, 140\]"),
    "an unknown activation": (MXFP4, dict(activation="tanh"), ValueError, "activation must be one of silu, gelu, relu2, got 'tanh'"),
    "alpha without a limit": (MXFP4, dict(gemm1_alpha=1.702), ValueError, "gemm1_limit must be given with gemm1_alpha, got None"),
    "a limit without alpha": (MXFP4, dict(gemm1_limit=7.0), ValueError, "gemm1_limit must be None without gemm1_alpha, got 7.0"),
    "two limits": (MXFP4, dict(gemm1_alpha=1.0, gemm1_limit=7.0, swiglu_limit=1.0), ValueError, "swiglu_limit must be None with gemm1_alpha, got 1.0"),
    "a limit of gelu": (MXFP4, dict(activation="gelu", swiglu_limit=1.0), ValueError, "swiglu_limit must be None with gelu, got 1.0"),
    "a bias's shape": (MXFP4, dict(b2=torch.ones(EXPERTS, 3)), ValueError, r"b2 must be \[3, 140\], got \[3, 3\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input(wrong):
    arguments, changes, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        fused_experts(**arguments | changes)
