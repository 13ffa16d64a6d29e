"""Training of Transformers' models on moe_xe: losses and the gradients of all parameters are eager's."""
from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

import moe_xe.integrations.transformers as integration  # noqa: E402


HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 64, 32, 8, 3, 61      # those of test_transformers.py

integration.register()


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread():
    """Models this small only lose by more, and much where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=1e-4):
    """Within `tolerance` times the RMS of each expected gradient."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        rms = gradient.square().mean().sqrt()
        assert rms > 0 and (actual[name] - gradient).abs().max() <= tolerance * rms, name


# ---------------------------------------------------------------------------------------------------- whole models

MODELS = {
    "Qwen3Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, head_dim=16, norm_topk_prob=True),
    "GptOss": dict(num_local_experts=EXPERTS, head_dim=16, sliding_window=8,
                   layer_types=["sliding_attention", "full_attention"]),
    "DeepseekV3": dict(n_routed_experts=EXPERTS, n_shared_experts=1, moe_intermediate_size=INTERMEDIATE, n_group=4,
                       topk_group=2, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                       qk_nope_head_dim=8, v_head_dim=16),
    "Mixtral": dict(num_local_experts=EXPERTS),
}
ROUTERS = {"Qwen3Moe": "mlp.gate", "GptOss": "mlp.router", "DeepseekV3": "mlp.gate", "Mixtral": ".gate"}


def make_model(name):
    config = getattr(transformers, name + "Config")(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, num_experts_per_tok=TOP_K,
        initializer_range=0.2, tie_word_embeddings=False, intermediate_size=INTERMEDIATE, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_xe").train()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones of an initialisation hide what they multiply
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def step(model, prompt, implementation):
    """The loss, and the gradients by name."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    loss = model(prompt, labels=prompt, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """The experts modules that ran on moe_xe."""
    seen = []

    def forward(experts, *args, **kwargs):
        seen.append(experts)
        return integration.experts_forward(experts, *args, **kwargs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moe_xe", forward)
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_step_agrees_with_eager(name, checkpointing, calls):
    model, prompt = make_model(name), torch.randint(2, VOCABULARY, (2, 4))
    expected_loss, expected = step(model, prompt, "eager")
    assert not calls and any(ROUTERS[name] in parameter for parameter in expected)
    if checkpointing:
        model.activation_checkpointing_enable()
    loss, gradients = step(model, prompt, "moe_xe")
    assert len(calls) == 2 * (2 if checkpointing else 1)  # layers, each once more where backward computes it again
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected)


def test_frozen_experts_hand_gradients_on():
    """As with adapters: only what needs a gradient gets one."""
    model, prompt = make_model("Qwen3Moe"), torch.randint(2, VOCABULARY, (1, 7))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    (_, expected), (_, gradients) = (step(model, prompt, implementation) for implementation in ("eager", "moe_xe"))
    assert not any("experts" in name for name in gradients)
    assert_same_gradients(gradients, expected)


# ------------------------------------------------------------------------------------------------ experts' modules

QWEN3 = ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
NEMOTRON = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")
INKLING2 = ("transformers.models.inkling2.modeling_inkling2", "Inkling2Experts")        # its gate is no activation of fused_moe
MUSE_SPARK = ("transformers.models.muse_spark.modeling_muse_spark", "MuseSparkExperts")   # has a norm behind each expert


def make_experts(module, name, act="silu", dtype=torch.float32):
    config = SimpleNamespace(
        num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
        hidden_size=HIDDEN, moe_hidden_size=HIDDEN, moe_latent_size=None, intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE, hidden_act=act, hidden_activation=act, mlp_hidden_act=act, swiglu_alpha=1.702,
        swiglu_limit=1.5, mlp_gate_softcap=2.0, mlp_up_softcap=2.0, post_norm_eps=1e-6, rms_norm_eps=1e-6)
    experts = getattr(importlib.import_module(module), name)(config)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


def make_inputs(num_tokens, dtype=torch.float32):
    """Hidden states, ids, weights, and the gradient of the output."""
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    return (torch.randn(num_tokens, HIDDEN, dtype=dtype), ids, torch.rand(num_tokens, TOP_K),
            torch.randn(num_tokens, HIDDEN, dtype=dtype))


def experts_gradients(experts, implementation, hidden_states, ids, weights, grad_out, run=None):
    """The output, and gradients of hidden states, routing weights and parameters by name."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    hidden_states, weights = (tensor.clone().requires_grad_() for tensor in (hidden_states, weights))
    out = (experts if run is None else run)(hidden_states, ids, weights)
    out.backward(grad_out)
    return out.detach(), {"hidden_states": hidden_states.grad, "weights": weights.grad,
                          **{name: p.grad.clone() for name, p in experts.named_parameters()}}


@pytest.mark.few(3)
@pytest.mark.parametrize("module, name", [QWEN3, GPT_OSS, NEMOTRON, INKLING2, MUSE_SPARK])
def test_ids_of_other_ranks_have_no_gradient(module, name):
    experts, (hidden_states, ids, weights, grad_out) = make_experts(module, name), make_inputs(29)
    elsewhere = torch.rand(ids.shape) < 0.4
    elsewhere[3] = True
    expected_out, expected = experts_gradients(experts, "eager", hidden_states, ids, weights.masked_fill(elsewhere, 0), grad_out)
    expected["weights"].masked_fill_(elsewhere, 0)
    out, gradients = experts_gradients(experts, "moe_xe", hidden_states, ids.masked_fill(elsewhere, EXPERTS), weights, grad_out)
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-4)
    assert not gradients["hidden_states"][3].any()
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("module, name", [QWEN3, GPT_OSS, INKLING2, MUSE_SPARK])
def test_no_tokens(module, name):
    """As a rank may have none under expert parallelism: gradients are zeros and not missing, which other ranks would wait for."""
    inputs = (tensor[:0] for tensor in make_inputs(1))
    out, gradients = experts_gradients(make_experts(module, name), "moe_xe", *inputs)
    assert out.shape == gradients["hidden_states"].shape == (0, HIDDEN) and gradients["weights"].shape == (0, TOP_K)
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("act", ["quick_gelu", "prelu"])
@pytest.mark.parametrize("module, name", [QWEN3, NEMOTRON])
def test_other_activations(module, name, act):
    """The module's own gate, with a parameter of its own where it has one."""
    experts, inputs = make_experts(module, name, act), make_inputs(13)
    (_, expected), (_, gradients) = (experts_gradients(experts, way, *inputs) for way in ("eager", "moe_xe"))
    assert_same_gradients(gradients, expected)


@pytest.mark.full       # the block's own tests have these types
@pytest.mark.parametrize("module, name", [QWEN3, INKLING2])     # a clamp's derivative would jump with a rounding
def test_bfloat16(module, name):
    """Against float32: no further from it than eager is."""
    experts, inputs = make_experts(module, name, dtype=torch.bfloat16), make_inputs(19, torch.bfloat16)
    (_, eager), (_, gradients) = (experts_gradients(experts, way, *inputs) for way in ("eager", "moe_xe"))
    hidden_states, ids, weights, grad_out = inputs
    _, exact = experts_gradients(experts.float(), "eager", hidden_states.float(), ids, weights, grad_out.float())
    for key, expected in exact.items():
        error, eager_error = ((found[key].float() - expected).norm() / expected.norm() for found in (gradients, eager))
        assert error < 0.01 and error < 1.2 * eager_error, key


@pytest.mark.parametrize("module, name", [QWEN3, *(pytest.param(*family, marks=pytest.mark.full) for family in (GPT_OSS, INKLING2))])
def test_experts_compile_without_graph_breaks(module, name):
    torch.compiler.reset()  # all families share one forward, and dynamo's limit of versions of it
    experts = make_experts(module, name)
    experts.config._experts_implementation = "moe_xe"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for num_tokens in (8, 6):
        inputs = make_inputs(num_tokens)
        expected_out, expected = experts_gradients(experts, "moe_xe", *inputs)
        out, gradients = experts_gradients(experts, "moe_xe", *inputs, run=compiled)
        torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients, expected, 1e-5)
