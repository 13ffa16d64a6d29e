"""Transformers' FP8 experts on moe_xe: weights in place, activations in 16 bits."""
from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts  # noqa: E402
from transformers.integrations.moe import use_experts_implementation  # noqa: E402

import moe_xe.integrations.transformers as integration  # noqa: E402
from moe_xe.integrations.transformers import fused_activation  # noqa: E402
from moe_xe.nn import LoraExperts  # noqa: E402
from tests.integrations import checkpoints  # noqa: E402
from tests.integrations.test_transformers import _model, _prompt, _routing, _tiny  # noqa: E402

integration.register()


def fp8_experts(hidden_size=64, intermediate_size=32, has_gate=True, **options):
    """As Transformers makes them for a checkpoint: a class of its own, so that others' are left alone."""
    kind = use_experts_implementation(type("Experts", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=has_gate)
    config = _tiny(hidden_size, intermediate_size)
    config.swiglu_alpha = config.swiglu_limit = config.mlp_gate_softcap = None
    config._experts_implementation = "moe_xe"
    experts = kind(config=config, has_gate=has_gate, **options)
    for name, parameter in experts.named_parameters():
        if name.endswith("_scale_inv"):
            parameter.data.copy_(torch.exp2(torch.randint(-6, -3, parameter.shape).float()))
        elif parameter.dtype == torch.int8:
            parameter.data.random_(-128, 128)
        else:
            parameter.data.copy_(torch.randn(parameter.shape))
    return experts


def dense_of(codes, scales, block):
    """By the definition: each number times its block's scale; gate and up have one each, if there are two."""
    if codes.dtype == torch.int8:
        nibbles = codes.view(torch.uint8).long()
        numbers = checkpoints.E2M1[torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(-2)]
        return (numbers.unflatten(-1, (-1, 32)) * scales.float()[..., None]).flatten(-2)
    n, k = codes.shape[1:]
    rows, columns = block or (n, k)
    rows = n // 2 if scales.shape[1] == 2 else rows
    spread = scales.float().repeat_interleave(rows, 1)[:, :n].repeat_interleave(columns, 2)[..., :k]
    return codes.float() * spread


def expected_of(experts, x, ids, weights):
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    w13, w2 = (dense_of(getattr(experts, name).detach(), getattr(experts, f"{name}_scale_inv").detach(), experts.block_size)
               for name in (first, "down_proj"))
    out = torch.zeros_like(x)
    for slot in range(ids.shape[1]):
        h = torch.einsum("th,tnh->tn", x, w13[ids[:, slot]])
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        out += torch.einsum("ti,thi->th", h, w2[ids[:, slot]]) * weights[:, slot, None]
    return out


@pytest.mark.few(2)
@pytest.mark.parametrize("options", [
    dict(block_size=(16, 32)), dict(), dict(block_size=(128, 128)), dict(block_size=(16, 16), intermediate_size=40, hidden_size=56),
    dict(block_size=(1, 32), scale_fmt="ue8m0"), dict(expert_dtype="fp4", scale_fmt="ue8m0"), dict(activation_scheme="static"),
    dict(block_size=(16, 32), has_gate=False)], ids=str)
@torch.inference_mode()
def test_experts(options):
    experts, (ids, weights), x = fp8_experts(**options), _routing(7), torch.randn(7, options.get("hidden_size", 64))
    expected = expected_of(experts, x, ids, weights)
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert fused_activation(experts) is not None


def test_scales_that_mxfp4_has_not():
    experts, (ids, weights) = fp8_experts(expert_dtype="fp4"), _routing(3)
    with pytest.raises(TypeError, match="scales must be torch.float8_e8m0fnu or torch.uint8 for mxfp4, got torch.float32"):
        experts(torch.randn(3, 64), ids, weights)


@pytest.mark.full
def test_gradients():
    """Adapters that begin as nothing change neither the results nor the hidden states' gradient."""
    experts, (ids, weights), x = fp8_experts(block_size=(16, 32)), _routing(7), torch.randn(7, 64, requires_grad=True)
    expected, out = expected_of(experts, x, ids, weights), LoraExperts(experts, 2)(x, ids, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    gradient = torch.randn_like(x)
    (theirs,), (ours,) = (torch.autograd.grad(value, x, gradient) for value in (expected, out))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@torch.inference_mode()
def test_model_from_pretrained(tmp_path, monkeypatch):
    """Transformers keeps FP8 where it finds a GPU and accelerate; the experts alone need neither."""
    for name in ("is_accelerate_available", "is_torch_xpu_available"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_finegrained_fp8.{name}", lambda: True)
    checkpoints.write(tmp_path / "fp8", tmp_path / "dense", _model("Qwen3Moe"), "fp8_experts")
    model, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, experts_implementation=implementation)
                    for folder, implementation in (("fp8", "moe_xe"), ("dense", "eager")))
    assert sum(isinstance(module, FP8Experts) for module in model.modules()) == 2
    prompt = _prompt()
    torch.testing.assert_close(model(prompt, use_cache=False).logits, dense(prompt, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    generation = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, **generation), dense.generate(prompt, **generation))
