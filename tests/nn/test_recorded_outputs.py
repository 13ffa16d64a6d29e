"""What Transformers records of its own blocks, router logits above all, it finds in moe_xe.nn's."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch

from moe_xe.nn import DeepseekV3Block, GptOssBlock, Llama4Block, MixtralBlock, Qwen3MoeBlock

transformers = pytest.importorskip("transformers", minversion="5.23")

from tests.ops.block.case import HIDDEN, INTERMEDIATE  # noqa: E402

EXPERTS, TOP_K, VOCABULARY, LAYERS = 8, 3, 61, 3

_COMMON = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
               head_dim=16, num_experts_per_tok=TOP_K, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
               intermediate_size=INTERMEDIATE, tie_word_embeddings=False, experts_implementation="eager")
FAMILIES = {
    "Qwen3Moe": (Qwen3MoeBlock, dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE)),
    "Mixtral": (MixtralBlock, dict(num_local_experts=EXPERTS)),
    "GptOss": (GptOssBlock, dict(num_local_experts=EXPERTS, layer_types=["full_attention"] * LAYERS)),
    "DeepseekV3": (DeepseekV3Block, dict(
        n_routed_experts=EXPERTS, n_shared_experts=2, moe_intermediate_size=INTERMEDIATE, n_group=4, topk_group=2,
        first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=4,
        head_dim=8)),
    "Llama4": (Llama4Block, dict(num_local_experts=EXPERTS, intermediate_size_mlp=INTERMEDIATE, interleave_moe_layer_step=1)),
}
family = pytest.mark.parametrize("family", FAMILIES)


def make_model(family: str):
    """A causal language model whose every layer is sparse."""
    config = getattr(transformers, family + ("TextConfig" if family == "Llama4" else "Config"))(**_COMMON | FAMILIES[family][1])
    model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def from_hf(block, module):
    return block.from_hf(module)


def built(block, module):
    """Made of numbers and a state dict."""
    ours = block(**block.numbers_of(module))
    ours.load_state_dict(module.state_dict())
    return ours


def replace(model, family: str, layers, make=from_hf):
    block = FAMILIES[family][0]
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ == block.hf_class]
    assert len(found) == LAYERS
    for layer in layers:
        name, module = found[layer]
        model.set_submodule(name, make(block, module))
    return model


def recorded(model, prompt) -> dict[str, tuple[torch.Tensor, ...]]:
    keys = list(model.model._can_record_outputs)
    assert "router_logits" in keys
    outputs = model.model(prompt, use_cache=False, **{f"output_{key}": True for key in keys})
    return {key: outputs[key] for key in keys}


@pytest.mark.few(3)
@pytest.mark.parametrize("layers", [range(LAYERS), [1]], ids=["all", "some"])
@pytest.mark.parametrize("way", ["from_hf", "from_hf after recording", "built"])
@family
@torch.inference_mode()
def test_all_that_is_recorded(family, way, layers):
    model, prompt = make_model(family).eval(), torch.randint(2, VOCABULARY, (2, 7))
    model.set_attn_implementation("eager")      # of which attentions are recorded
    other = copy.deepcopy(model)
    expected = recorded(model, prompt)
    if way == "from_hf after recording":
        other = model
    results = recorded(replace(other, family, layers, built if way == "built" else from_hf), prompt)
    for key, tensors in expected.items():
        assert len(results[key]) == len(tensors) >= LAYERS, key
        for result, tensor in zip(results[key], tensors):
            torch.testing.assert_close(result, tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("layers", [range(LAYERS), [0, 2]], ids=["all", "some"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_auxiliary_loss(family, layers):
    """As Trainer asks for it: by the configuration. Its value, and what it does to the routers."""
    model, prompt = make_model(family), torch.randint(2, VOCABULARY, (2, 7))
    model.config.output_router_logits, model.router_aux_loss_coef = True, 10.0
    results = []
    for model in (copy.deepcopy(model), replace(model, family, layers)):
        output = model(prompt, labels=prompt, use_cache=False)
        output.loss.backward()
        routers = [p.grad for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))]
        assert len(routers) == LAYERS
        results.append((output.aux_loss, output.loss, *routers))
    for expected, result in zip(*results):
        rms = expected.square().mean().sqrt()
        assert rms > 0 and (result - expected).abs().max() <= 1e-4 * rms


@family
@torch.inference_mode()
def test_blocks_are_copied_and_pickled(family):
    model = make_model(family).requires_grad_(False)
    block_class = FAMILIES[family][0]
    module = next(module for module in model.modules() if type(module).__name__ == block_class.hf_class)
    block, x = block_class.from_hf(module), torch.randn(1, 5, HIDDEN)
    name, router = next((name, child) for name, child in module.named_children() if name in ("gate", "router"))
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), block_class(**block_class.numbers_of(module))):
        assert isinstance(getattr(other, name), type(router)) and repr(getattr(other, name)) == repr(getattr(block, name))
        other.load_state_dict(block.state_dict())
        for result, expected in zip(other(x), block(x)):
            assert torch.equal(result, expected)
