"""LoraExperts against its experts with merged weights, and against PEFT: by its formula, and the package where it is installed."""
from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moe_xe.nn import DeepseekV3Block, Experts, Llama4Block, LoraExperts, Qwen3MoeBlock
from tests.ops.block.case import HIDDEN, INTERMEDIATE


EXPERTS, TOP_K, TOKENS, RANK = 6, 3, 7, 8
SIZES = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
GPT_OSS = dict(activation="swiglu_oai", alpha=1.702, limit=0.7, interleaved=True, transposed=True, bias=True)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1]**0.5)
    return module


def lora(experts: nn.Module, **options) -> LoraExperts:
    """With adapters that change what comes out."""
    module = LoraExperts(experts, RANK, 6, **options)
    randomized(module.lora_A)
    randomized(module.lora_B)
    return module


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights, topk_ids."""
    return torch.rand(TOKENS, TOP_K), torch.rand(TOKENS, EXPERTS).topk(TOP_K)[1]


def delta(weight_a: torch.Tensor, weight_b: torch.Tensor, num_experts: int, transposed: bool) -> torch.Tensor:
    """What PEFT adds to a [E, out, in] weight (transposed: [E, in, out]), but for its scaling, of its two linear layers'."""
    a, b = weight_a.reshape(num_experts, -1, weight_a.shape[1]), weight_b.reshape(weight_b.shape[0], -1, num_experts)
    return torch.einsum("ore,eri->eio" if transposed else "ore,eri->eoi", b, a)


def hf_experts(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    numbers = dict(hidden_size=HIDDEN, num_experts_per_tok=TOP_K, num_attention_heads=5, experts_implementation="eager")
    if name == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        return randomized(GptOssExperts(transformers.GptOssConfig(**numbers, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)))
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    return randomized(Qwen3MoeExperts(transformers.Qwen3MoeConfig(**numbers, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-4 * want.square().mean().sqrt() and want.any()


@pytest.mark.parametrize("options", [dict(), GPT_OSS], ids=["silu", "gpt-oss"])
def test_merged(options):
    experts = randomized(Experts(**SIZES, **options))
    module = lora(experts)
    x, (weights, ids) = torch.randn(TOKENS, HIDDEN), routing()
    out = module(x, weights, ids)
    plain = experts(x, weights, ids)
    assert module.merge() is experts
    assert_close(experts(x, weights, ids), out)
    assert torch.equal(module(x, weights, ids), lora_free(module, x, weights, ids)) and (out - plain).abs().max() > 0.1


def lora_free(module: LoraExperts, *arguments) -> torch.Tensor:
    """As the module gives it where the adapters are zero."""
    module = copy.deepcopy(module)
    for b in module.lora_B.values():
        b.data.zero_()
    return module(*arguments)


@pytest.mark.parametrize("block", [
    Qwen3MoeBlock(**SIZES, top_k=TOP_K), pytest.param(Llama4Block(**SIZES, top_k=1, shared_intermediate_size=INTERMEDIATE + 4), marks=pytest.mark.full),
    DeepseekV3Block(**SIZES, top_k=TOP_K, shared_intermediate_size=INTERMEDIATE + 4, num_groups=2, topk_groups=1)], ids=lambda block: type(block).__name__)
def test_in_a_block(block):
    """It begins as the block it is put into; then only the adapters learn, and the tokens before it."""
    randomized(block)
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)

    def result():
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    plain = result().detach()
    block.experts = LoraExperts(block.experts, RANK)
    out = result()
    assert_close(out.detach(), plain)
    out.square().mean().backward()
    experts = dict(block.experts.named_parameters())
    assert {name for name, parameter in experts.items() if parameter.requires_grad} == {
        f"lora_{part}.{name}" for part in "AB" for name in ("gate_up_proj", "down_proj")}
    assert all(parameter.grad is None for name, parameter in experts.items() if name.startswith("base_layer"))
    assert all(b.grad.any() for b in block.experts.lora_B.values()) and x.grad.any()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_transformers_experts(name):
    """Against eager experts with merged weights: the result, and the adapters' gradients."""
    experts = hf_experts(name)
    eager = copy.deepcopy(experts)
    module = lora(experts)
    x, (weights, ids) = torch.randn(TOKENS, HIDDEN), routing()
    merged = {}
    for key in ("gate_up_proj", "down_proj"):
        w, change = getattr(eager, key).detach(), module.lora_B[key] @ module.lora_A[key] * module.scaling
        merged[key] = w + (change.transpose(1, 2) if eager.is_transposed else change)
    grad_out = torch.randn(TOKENS, HIDDEN)
    results = []
    for out in (module(x, ids, weights), torch.func.functional_call(eager, merged, (x, ids, weights))):
        results.append([out, *torch.autograd.grad(out, [*module.lora_A.values(), *module.lora_B.values()], grad_out)])
    for got, want in zip(*results):
        assert_close(got, want)


def test_initial_values_and_scaling():
    experts = Experts(**SIZES, dtype=torch.bfloat16)
    module = LoraExperts(experts, 16, 8, use_rslora=True, dtype=torch.float32)
    assert module.scaling == 2 and LoraExperts(experts, 16, 8).scaling == 0.5
    for name, size in (("gate_up_proj", HIDDEN), ("down_proj", INTERMEDIATE)):
        a, b = module.lora_A[name], module.lora_B[name]
        assert a.dtype == torch.float32 and not b.any()
        assert 0.9 * size**-0.5 < a.abs().max() <= size**-0.5 and abs(a.mean()) < 0.1 * size**-0.5


@pytest.mark.parametrize("options", [dict(), dict(target_parameters=["down_proj"]), dict(target_parameters=["gate_up_proj"])], ids=str)
def test_peft_state_dict(options):
    """Its names, nested in the order of the module's weights, and its layouts; there and back."""
    module, prefix = lora(Experts(**SIZES), **options), "layers.1.mlp.experts."
    state = module.peft_state_dict(prefix)
    targets = {0: "gate_up_proj", 1: "down_proj"} if not options else {1: options["target_parameters"][0]}
    wrapper = {0: "base_layer.", 1: ""}
    assert set(state) == {f"{prefix}{wrapper[place]}lora_{part}.weight" for place in targets for part in "AB"}
    for place, name in targets.items():
        a, b = (state[f"{prefix}{wrapper[place]}lora_{part}.weight"] for part in "AB")
        out, size = getattr(module.base_layer, name).shape[1:]
        assert a.shape == (EXPERTS * RANK, size) and b.shape == (out, EXPERTS * RANK)
        torch.testing.assert_close(delta(a, b, EXPERTS, False), module.lora_B[name] @ module.lora_A[name])
    other = LoraExperts(Experts(**SIZES), RANK, **options)
    other.load_peft_state_dict(state | {"layers.2.mlp.experts.lora_A.weight": torch.ones(1)}, prefix)
    for name, adapter in module.adapters().items():
        assert torch.equal(other.lora_A[name], adapter.a) and torch.equal(other.lora_B[name], adapter.b)
    assert set(module.peft_state_dict(adapter_name="default")) == {
        key.removeprefix(prefix).replace(".weight", ".default.weight") for key in state}


def test_wrong_state_dicts_change_nothing():
    module = lora(Experts(**SIZES))
    state, before = module.peft_state_dict(), copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="must have the key 'base_layer.lora_B.weight'"):
        module.load_peft_state_dict({key: torch.ones_like(value) for key, value in state.items() if key != "base_layer.lora_B.weight"})
    with pytest.raises(ValueError, match=r"state_dict\['lora_B.weight'\] must be \[50, 48\], got \[48, 50\]"):
        module.load_peft_state_dict({key: torch.ones_like(value) for key, value in state.items()} | {"lora_B.weight": state["lora_B.weight"].T})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("options", [dict(), GPT_OSS], ids=["silu", "gpt-oss"])
def test_state_dict_is_the_experts_and_the_adapters(options):
    """It loads into a model without adapters, and both kinds' load into one that has them."""
    model = nn.ModuleDict({"experts": lora(randomized(Experts(**SIZES, **options)))})
    state, names = model.state_dict(), Experts(**SIZES, **options).state_dict().keys()
    adapters = {f"experts.lora_{part}.{name}" for part in "AB" for name in ("gate_up_proj", "down_proj")}
    assert state.keys() == {f"experts.{name}" for name in names} | adapters
    plain = nn.ModuleDict({"experts": Experts(**SIZES, **options)})
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing and set(unexpected) == adapters
    other = nn.ModuleDict({"experts": lora(Experts(**SIZES, **options))})
    before = copy.deepcopy(other["experts"].adapters())
    missing, unexpected = other.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == adapters and not unexpected
    assert all(torch.equal(adapter.a, before[name].a) for name, adapter in other["experts"].adapters().items())
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    x, (weights, ids) = torch.randn(TOKENS, HIDDEN), routing()
    assert torch.equal(other["experts"](x, weights, ids), model["experts"](x, weights, ids))
    assert torch.equal(plain["experts"](x, weights, ids), model["experts"].base_layer(x, weights, ids))


@pytest.mark.parametrize("arguments, error, match", [
    (dict(experts=nn.Linear(2, 2)), TypeError, "experts must be moe_xe.nn.Experts or .*got Linear"),
    (dict(r=0), ValueError, "r must be a positive int, got 0"),
    (dict(target_parameters=["up_proj"]), ValueError, r"target_parameters must be some of \['gate_up_proj', 'down_proj'\]"),
    (dict(target_parameters=[]), ValueError, "target_parameters must be some of")])
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        LoraExperts(**dict(experts=Experts(**SIZES)) | arguments)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_against_peft(name):
    """The package itself: its adapters loaded here give its result and its gradients, and ours loaded there give ours."""
    peft = pytest.importorskip("peft", minversion="0.21")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = hf_experts(name)

        def forward(self, *arguments):
            return self.experts(*arguments)

    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = Model()
    module = LoraExperts(copy.deepcopy(model.experts), RANK, 6)
    wrapped = peft.get_peft_model(model, config)
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=parameter.shape[-1]**-0.5)
    prefix = "base_model.model.experts."
    module.load_peft_state_dict(peft.get_peft_model_state_dict(wrapped), prefix)
    x, (weights, ids) = torch.randn(TOKENS, HIDDEN), routing()
    out, want = module(x, ids, weights), wrapped(x, ids, weights)
    assert_close(out, want)
    grad_out = torch.randn(TOKENS, HIDDEN)
    torch.autograd.backward([out, want], [grad_out, grad_out])
    theirs = {key: parameter.grad for key, parameter in wrapped.named_parameters() if "lora_" in key}
    for parameter in module.parameters():      # in PEFT's layouts
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    ours = module.peft_state_dict(prefix, "default")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_close(ours[key], theirs[key])

    module = lora(copy.deepcopy(wrapped.base_model.model.experts.get_base_layer()))
    outcome = peft.set_peft_model_state_dict(wrapped, module.peft_state_dict(prefix))
    assert not outcome.unexpected_keys
    assert_close(wrapped(x, ids, weights), module(x, ids, weights))
