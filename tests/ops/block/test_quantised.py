"""The block with quantised weights, against the dequantised ones in float64: the kernels' own formats have tests of their own."""
from __future__ import annotations

import pytest
import torch

from moe_xe import Fusions, LoraAdapter, QuantizedWeight, SharedExpert, fused_moe, lora_moe
from moe_xe.plan.formats import FORMATS

from .case import TOKENS, assert_right, check, dense, make, make_shared, moved, reference, run

BF16, F32 = torch.bfloat16, torch.float32
SIZES = dict(hidden=50, intermediate=38)     # even, as codes of 4 bits lie in pairs
GPT_OSS = dict(activation="swiglu_oai", interleaved=True, limit=2.0, bias=(BF16, BF16))
GROUPS = {"int4": (1, 16), "uint4": (1, 32), "int8": (1, 50), "fp8_e4m3": (16, 16), "fp8_e5m2": (76, 50)}


def quantised(w: torch.Tensor, format: str, **options) -> QuantizedWeight:
    return QuantizedWeight.quantize(w, format, FORMATS[format].group or GROUPS[format], **options)


def block(first: str, second: str, dtype=BF16, **options) -> dict:
    """Arguments of fused_moe with weights of these formats; "dense" stays as it is."""
    arguments = make(dtype=dtype, **SIZES | options)
    for name, format in (("w13", first), ("w2", second)):
        if format != "dense":
            arguments[name] = quantised(arguments[name], format)
    return arguments


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32], ids=str)
@pytest.mark.parametrize("formats", [
    pytest.param(("mxfp4", "mxfp4"), marks=pytest.mark.full), ("int4", "uint4"), ("fp8_e4m3", "fp8_e4m3"), ("nvfp4", "int8"), ("mxfp8", "dense"),
    ("dense", "fp8_e5m2")], ids="-".join)
def test_formats(formats, dtype, device):
    check(block(*formats, dtype, tokens=31), device)


@pytest.mark.full       # test_experts_are_sliced has them, too
def test_the_fusions_of_gpt_oss(device):
    check(block("mxfp4", "mxfp4", **GPT_OSS), device)


@pytest.mark.few(1)
@pytest.mark.parametrize("shared", ["gate dense", "dense", "int4"])
def test_shared_expert(shared, device):
    weights = make_shared(22, hidden=50, dtype=BF16, weights=torch.rand(TOKENS))
    if shared != "dense":
        up, down, gate = (quantised(w[None], "int4") for w in (weights.up_proj, weights.down_proj, weights.gate_proj))
        weights = SharedExpert(up, down, weights.gate_proj if shared == "gate dense" else gate, weights.weights)
    check(block("int4", "int4", shared=weights), device)


@pytest.mark.full
def test_dense_experts_with_a_quantised_shared_one(device):
    weights = make_shared(38, hidden=50, dtype=BF16, gated=False)
    up, down = (quantised(w[None], "fp8_e4m3") for w in (weights.up_proj, weights.down_proj))
    check(make(dtype=BF16, **SIZES, gated=False, shared=SharedExpert(up, down), activation="relu2"), device)


def test_one_launch_equals_four(device):
    arguments = block("int4", "int4")
    assert torch.equal(run(arguments, device), run(arguments, device, Fusions(launches=False)))


def test_transposed_codes(device):
    """[E, K, N] weights, whose codes are [E, N, K]; and codes that lie [E, K, N]."""
    arguments = block("int4", "int4")
    expected = run(arguments, device)
    turned = arguments | dict(w13=arguments["w13"].mT, w2=arguments["w2"].mT, weight_layout="ekn")
    assert torch.equal(run(turned, device), expected)
    codes = quantised(make(dtype=BF16, **SIZES, weight_layout="ekn")["w13"], "int8")      # [E, H, 2I]
    check(arguments | dict(w13=codes.mT), device)


def test_experts_are_sliced(device):
    """Expert parallelism: the same codes, some of the experts; with the fusions of gpt-oss."""
    arguments = block("mxfp4", "mxfp4", **GPT_OSS)
    some = arguments | dict(**{name: arguments[name][1:4] for name in ("w13", "w2", "b13", "b2")},
                            expert_map=torch.tensor([-1, 0, 1, 2, -1, -1], dtype=torch.int32))
    check(some, device)


def test_known_calls_look_at_the_scales(device):
    """Scales that have changed since change the result; others of the same shapes are not mistaken for them."""
    arguments = {name: moved(value, device) for name, value in block("int4", "int4", shared=None).items()}
    first = [fused_moe(**arguments) for _ in range(3)][-1]
    arguments["w2"].scales.mul_(2)
    assert_right(fused_moe(**arguments), reference(**{name: moved(value, "cpu") for name, value in arguments.items()}))
    arguments["w2"].scales.div_(2)
    other = arguments | dict(w2=QuantizedWeight(arguments["w2"].codes, arguments["w2"].scales * 3, format="int4", group=GROUPS["int4"]))
    assert_right(fused_moe(**other), reference(**{name: moved(value, "cpu") for name, value in other.items()}))
    assert torch.equal(fused_moe(**arguments), first)


@pytest.mark.few(1)
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("formats", [("mxfp4", "int8"), ("fp8_e4m3", "int8")], ids="-".join)
def test_gradients_of_what_is_not_quantised(formats, recompute, device):
    arguments = block(*formats, F32, bias=(F32, F32), intermediate=37)
    names = "hidden_states", "topk_weights", "b13", "b2"
    ours = {name: moved(value, device) for name, value in arguments.items()}
    theirs = {name: dense(value).double() if name in ("w13", "w2") else value for name, value in arguments.items()}
    for of, dtype in ((ours, F32), (theirs, torch.float64)):
        of |= {name: of[name].detach().to(dtype).requires_grad_() for name in names}
    out = fused_moe(**ours, recompute=recompute)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    reference(**theirs).backward(gradient.cpu().double())
    for name in names:
        got, want = ours[name].grad.cpu().double(), theirs[name].grad
        assert (got - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.few(1)
@pytest.mark.parametrize("formats", [("mxfp4", "int8"), ("int8", "int8")], ids="-".join)
def test_adapters_on_quantised_weights(formats, device):
    """lora_moe: the result, and the gradients of adapters and input."""
    arguments = block(*formats, F32, bias=(F32, F32), intermediate=37)
    parts = [torch.randn(6, *shape) for shape in ((8, 50), (74, 8), (5, 37), (50, 5))]
    gradient = torch.randn(TOKENS, 50)

    def results(function, x, a13, b13, a2, b2):
        leaves = [value.detach().requires_grad_() for value in (x, a13, b13, a2, b2)]
        out = function(leaves[0], LoraAdapter(*leaves[1:3], 0.1), LoraAdapter(*leaves[3:], 0.1))
        out.backward(gradient.to(out))
        return out.detach(), *(leaf.grad for leaf in leaves)

    def adapted(x, lora13, lora2):
        return lora_moe(**{name: moved(value, device) for name, value in arguments.items()} | dict(hidden_states=x, lora13=lora13, lora2=lora2))

    def merged(x, lora13, lora2):
        w13, w2 = (dense(arguments[name]) + lora.scaling * lora.b @ lora.a for name, lora in (("w13", lora13), ("w2", lora2)))
        return reference(**arguments | dict(hidden_states=x, w13=w13, w2=w2))

    ours = results(adapted, *(value.to(device) for value in (arguments["hidden_states"], *parts)))
    for got, want in zip(ours, results(merged, *(value.double() for value in (arguments["hidden_states"], *parts)))):
        assert (got.cpu() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.full
def test_compiles_to_one_graph(device):
    arguments = {name: moved(value, device) for name, value in block("mxfp4", "mxfp4").items()}
    compiled = torch.compile(lambda x: fused_moe(**arguments | dict(hidden_states=x)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["hidden_states"]), fused_moe(**arguments) * 2)


def test_bad_input(device):
    arguments = {name: moved(value, device) for name, value in block("int4", "int4").items()}
    w13 = arguments["w13"]
    learnt = QuantizedWeight(w13.codes, w13.scales.clone().requires_grad_(), format="int4", group=w13.group)
    for changes, error, message in (
            (dict(w13=w13.codes), TypeError, "w13 must be bfloat16, float16 or float32, got torch.uint8; a quantised weight is a moe_xe.Quant"),
            (dict(w13=w13[:5]), ValueError, "must fit together"),
            (dict(w13=learnt), ValueError, "w13.scales must not require a gradient"),
            (dict(w13=w13.to("meta")), ValueError, "all tensors must be on one device: .* w13.codes is on meta"),
            (dict(hidden_states=arguments["hidden_states"][:, :48]), ValueError, "must agree in H"),
            (dict(shared=SharedExpert(w13, w13)), ValueError, "shared.gate_proj must be given"),
            (dict(shared=SharedExpert(w13, w13, w13)), ValueError, r"shared.gate_proj must be of one expert, \[1, 76, 50\]")):
        with pytest.raises(error, match=message):
            fused_moe(**arguments | changes)
