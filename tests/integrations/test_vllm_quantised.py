"""The vLLM adapter with quantised weights, as vllm_xpu_kernels takes them, against loops in float64 over what they mean."""
from __future__ import annotations

import pytest
import torch

from moe_xe.integrations.vllm import XpuFusedMoe, xpu_fused_moe

from tests.integrations.quantised_weights import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K, numbers_of, routing, small_weight
from tests.integrations.test_vllm import ACTIVATIONS, assert_close, reference


def int4(n, k):
    weight = small_weight("uint4", n, k, (1, 35), torch.float16)
    return weight.codes, weight.scales, numbers_of(weight)


def mxfp4(n, k, scale_dtype=torch.uint8):
    weight = small_weight("mxfp4", n, k, None, scale_dtype)
    return weight.codes.view(torch.float4_e2m1fn_x2), weight.scales, numbers_of(weight)


def mxfp8(n, k, scale_dtype=torch.uint8):
    weight = small_weight("mxfp8", n, k, None, scale_dtype)
    return weight.codes.mT.contiguous(), weight.scales.mT.contiguous(), numbers_of(weight)


def block_fp8(n, k):
    weight = small_weight("fp8_e4m3", n, k, (128, 128))
    return weight.codes.mT.contiguous(), weight.scales.mT.contiguous(), numbers_of(weight)


def fp8(n, k):
    weight = small_weight("fp8_e5m2", n, k, (n, k))
    return weight.codes.mT.contiguous(), weight.scales.flatten(), numbers_of(weight)


FORMATS = {make.__name__: make for make in (int4, mxfp4, mxfp8, block_fp8, fp8)}


def case(make, dtype=torch.float32, halves=2):
    """Arguments of xpu_fused_moe but the last ones, and those of the reference."""
    w13, w13_scales, dense13 = make(halves * INTERMEDIATE, HIDDEN)
    w2, w2_scales, dense2 = make(HIDDEN, INTERMEDIATE)
    x, b13, b2 = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randn(EXPERTS, halves * INTERMEDIATE), torch.randn(EXPERTS, HIDDEN)
    topk_weights, topk_ids = routing()
    return ((x, w13, w13_scales, b13, w2, w2_scales, b2, topk_weights, topk_ids, TOP_K),
            (x, dense13.mT, b13, dense2.mT, b2, topk_weights, topk_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_formats_by_dtypes(format, dtype):
    """Weights are read where they lie, and the flag of the format changes nothing."""
    (x, w13, w13_scales, b13, w2, w2_scales, b2, *routed, top_k), expected = case(FORMATS[format], dtype)
    experts = XpuFusedMoe(w13, w13_scales, b13, w2, w2_scales, b2, top_k, "silu", EXPERTS)
    for weight, given in ((experts.w13, w13), (experts.w2, w2)):
        assert weight.codes.data_ptr() == given.data_ptr() and weight.nbytes < 1.5 * given.nbytes
    assert experts.w13.scales.data_ptr() == w13_scales.data_ptr()
    output = torch.full_like(x, float("nan"))
    experts.apply(output, x, *routed)
    assert_close(output, reference(*expected, ACTIVATIONS["silu"]))
    flagged = xpu_fused_moe(x, w13, w13_scales, b13, w2, w2_scales, b2, *routed, top_k, "silu", EXPERTS, **{f"is_{format}": True})
    assert torch.equal(flagged, output)


def test_mxfp4_of_bytes():
    arguments, expected = case(mxfp4)
    x, w13, s13, b13, w2, s2, *rest = arguments
    out = xpu_fused_moe(x, w13.view(torch.uint8), s13.view(torch.float8_e8m0fnu), b13, w2.view(torch.uint8), s2, *rest, "swigluoai", EXPERTS, is_mxfp4=True)
    assert_close(out, reference(*expected, ACTIVATIONS["swigluoai"]))


@pytest.mark.parametrize("make, group", [(block_fp8, (128, 128)), pytest.param(mxfp8, (1, 32), marks=pytest.mark.full)])
def test_views_of_the_checkpoints_order(make, group):
    """[E, K, N] views of [E, N, K] are not copied, either."""
    (x, *weights, topk_weights, topk_ids, top_k), expected = case(make)
    w13, s13, b13, w2, s2, b2 = weights
    w13, s13, w2, s2 = (tensor.mT.contiguous().mT for tensor in (w13, s13, w2, s2))
    if make is mxfp8:
        s13 = s13.view(torch.float8_e8m0fnu)
    experts = XpuFusedMoe(w13, s13, b13, w2, s2, b2, top_k, "silu", EXPERTS)
    assert experts.w13.codes.data_ptr() == w13.data_ptr() and experts.w13.shape == w13.shape and experts.w13.group == group
    output = torch.full_like(x, float("nan"))
    experts.apply(output, x, topk_weights, topk_ids)
    assert_close(output, reference(*expected, ACTIVATIONS["silu"]))


def test_a_quantized_weight_beside_a_dense_one():
    arguments, expected = case(int4)
    x, *_, b13, w2, s2, b2, topk_weights, topk_ids, top_k = arguments
    weight = small_weight("uint4", 2 * INTERMEDIATE, HIDDEN, (1, 35), torch.float16)
    dense2 = expected[3].float()
    out = xpu_fused_moe(x, weight.mT, None, b13, dense2, None, b2, topk_weights, topk_ids, top_k, "silu", EXPERTS)
    assert_close(out, reference(x, numbers_of(weight).mT, b13, dense2, b2, topk_weights, topk_ids, ACTIVATIONS["silu"]))


(X, W13, S13, B13, W2, S2, B2, WEIGHTS, IDS, _), _ = case(int4)
MX = mxfp4(2 * INTERMEDIATE, HIDDEN)
FP8 = fp8(2 * INTERMEDIATE, HIDDEN)
WRONG = {
    "a flag of another format": (dict(is_fp8=True), ValueError, r"is_fp8 must be False for w13 uint8\[3, 140, 70\] with w13_scales float16\[3, 140, 4\], got True"),
    "two flags": (dict(is_int4=True, is_mxfp8=True), ValueError, "is_mxfp8 must be False for w13 uint8"),
    "scales of dense weights": (dict(w2=W2.float()), ValueError, r"w2_scales must be None for torch.float32 weights, got float16\[3, 140, 2\]"),
    "no scales": (dict(w13_scales=None), TypeError, "w13 must be bfloat16, float16 or float32, got torch.uint8; a quantised weight"),
    "scales that are no tensor": (dict(w13_scales=1.0), TypeError, "w13_scales must be a torch.Tensor"),
    "groups that do not divide": (dict(w13_scales=S13[..., :3].contiguous()), ValueError, r"w13, w13_scales: scales must be \[3, 140, 4\]"),
    "float64 scales": (dict(w13_scales=S13.double()), TypeError, "w13, w13_scales: scales must be torch.float32, .* got torch.float64"),
    "scales of mxfp4": (dict(w13=MX[0], w13_scales=S13), TypeError, "w13, w13_scales: weight_scale must be .*e8m0fnu or torch.uint8 for mxfp4, got torch.float16"),
    "blocks": (dict(w13=FP8[0], w13_scales=torch.ones(3, 2, 3)), ValueError, r"w13, w13_scales: weight_scale_inv must be \[3, 2, 2\]"),
    "too few experts' scales": (dict(w13=FP8[0], w13_scales=torch.ones(2)), ValueError, "w13, w13_scales: scale must be .* got float32"),
    "another shape": (dict(w2=W2[:, :70].contiguous(), w2_scales=S2[:, :70].contiguous()), ValueError, r"w13 must be \[3, 70, 140\] for w2 QuantizedWeight"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input(wrong):
    changes, error, message = WRONG[wrong]
    arguments = dict(hidden_states=X, w13=W13, w13_scales=S13, w13_bias=B13, w2=W2, w2_scales=S2, w2_bias=B2, topk_weights=WEIGHTS, topk_ids=IDS,
                     n_experts_per_token=TOP_K, activation="silu", num_experts=EXPERTS)
    with pytest.raises(error, match=message):
        xpu_fused_moe(**arguments | changes)
