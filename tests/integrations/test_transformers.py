"""Transformers' models with their own experts and with moe_xe's."""
from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation  # noqa: E402

import moe_xe.integrations.transformers as integration  # noqa: E402
from moe_xe import MoeConfig  # noqa: E402
from moe_xe.integrations.transformers import fused_activation  # noqa: E402
from tests.ops.block import case  # noqa: E402
from tests.ops.tiles import tile  # noqa: E402


HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 64, 32, 8, 3, 96
ODD_SIZES = dict(hidden_size=case.HIDDEN, intermediate_size=case.INTERMEDIATE)      # for which tests of the block compile kernels

integration.register()


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread():
    """Models this small only lose by more, and much where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ whole models

def _config(name, **differences):
    common = dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, num_experts_per_tok=TOP_K,
        initializer_range=0.2, tie_word_embeddings=False, intermediate_size=INTERMEDIATE)
    return getattr(transformers, name + "Config")(**{**common, **differences})


_DEEPSEEK = dict(n_routed_experts=EXPERTS, n_shared_experts=1, moe_intermediate_size=INTERMEDIATE)
MODELS = {
    "Qwen3Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, head_dim=16, norm_topk_prob=True),
    "Qwen2Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE,
                     shared_expert_intermediate_size=INTERMEDIATE),
    "Qwen3Next": dict(
        num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, shared_expert_intermediate_size=INTERMEDIATE,
        head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"]),
    "Mixtral": dict(num_local_experts=EXPERTS),
    "GptOss": dict(num_local_experts=EXPERTS, head_dim=16, sliding_window=8,
                   layer_types=["sliding_attention", "full_attention"]),
    "DeepseekV3": dict(_DEEPSEEK, n_group=4, topk_group=2, first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16,
                       qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16),
    "DeepseekV4": dict(_DEEPSEEK, head_dim=16, q_lora_rank=16, o_lora_rank=16, o_groups=2, index_head_dim=16,
                       index_n_heads=2, qk_rope_head_dim=8, partial_rotary_factor=0.5, mlp_layer_types=["hash_moe", "moe"],
                       hc_mult=2, layer_types=["sliding_attention", "heavily_compressed_attention"], swiglu_limit=1.0),
    "Olmoe": dict(num_experts=EXPERTS),
    "Glm4Moe": dict(_DEEPSEEK, head_dim=16, n_group=1, topk_group=1, first_k_dense_replace=0),
    "NemotronH": dict(_DEEPSEEK, moe_shared_expert_intermediate_size=INTERMEDIATE, head_dim=16,
                      layers_block_type=["moe", "attention"]),
    "GraniteMoe": dict(num_local_experts=EXPERTS),
    "Ernie4_5_Moe": dict(moe_num_experts=EXPERTS, moe_k=TOP_K, moe_intermediate_size=INTERMEDIATE,
                         moe_layer_start_index=0, moe_layer_interval=1),
    "Dots1": dict(_DEEPSEEK, head_dim=16, first_k_dense_replace=0),
    "MiniMaxM2": dict(num_local_experts=EXPERTS, head_dim=16),
    "Phimoe": dict(num_local_experts=EXPERTS),
    "Lfm2Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, num_dense_layers=0,
                    layer_types=["conv", "full_attention"]),
}


def _model(name, **options):
    config = _config(name, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_xe", **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones of an initialisation hide what they multiply
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _prompt():
    return torch.randint(2, VOCABULARY, (2, 4))


@pytest.fixture
def calls(monkeypatch):
    """The experts modules that ran on moe_xe."""
    seen = []

    def forward(experts, *args, **kwargs):
        seen.append(experts)
        return integration.experts_forward(experts, *args, **kwargs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moe_xe", forward)
    return seen


# tests of their experts run kernels of two of these in the sample, and the third only differs in how many experts a token has
_FULL_MODELS = "DeepseekV4", "NemotronH", "Phimoe"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in _FULL_MODELS)) for name in MODELS])
@torch.inference_mode()
def test_model_agrees_with_eager(name, calls):
    model, prompt = _model(name), _prompt()
    logits = model(prompt, use_cache=False).logits
    assert calls
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    calls.clear()
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits, model(prompt, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert not calls


@pytest.mark.parametrize("name", ["Qwen3Moe", pytest.param("GptOss", marks=pytest.mark.full)])
@torch.inference_mode()
def test_bfloat16_model_agrees_with_eager(name):
    """Eager rounds the first GEMM's sums before the activation, moe_xe after it: a few units in the last place of
    bfloat16 per layer, unless that changes a token's experts. So the bound is on the median token."""
    model, prompt = _model(name, dtype=torch.bfloat16), _prompt()
    logits = model(prompt, use_cache=False).logits.float()
    model.set_experts_implementation("eager")
    expected = model(prompt, use_cache=False).logits.float()
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.03


def test_saved_model_loads_on_moe_xe(tmp_path, calls):
    model, prompt = _model("Qwen3Moe"), _prompt()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_xe").eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(prompt).logits, model(prompt).logits, rtol=0, atol=0)
    assert set(loaded.modules()) & set(calls)


# ------------------------------------------------------------------------------------- every experts class there is

# silu or gpt-oss' activation in another layout, for which kernels are compiled
_FULL_CLASSES = "AriaExperts", "OpenAIPrivacyFilterExperts"
_CLASS = re.compile(r"^@use_experts_implementation.*\nclass (\w+)", re.MULTILINE)


def _experts_classes():
    for file in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in _CLASS.findall(file.read_text()):
            yield pytest.param(f"transformers.models.{file.parent.name}.{file.stem}", name, id=name,
                               marks=[pytest.mark.full] * (name in _FULL_CLASSES))


def _tiny(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, act="silu"):
    """One stand-in for the configurations of all families, under all the names that they use."""
    return SimpleNamespace(
        num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
        hidden_size=hidden_size, moe_hidden_size=hidden_size, moe_latent_size=None,
        intermediate_size=intermediate_size, moe_intermediate_size=intermediate_size,
        hidden_act=act, hidden_activation=act, mlp_hidden_act=act,
        swiglu_alpha=1.702, swiglu_limit=1.5, mlp_gate_softcap=2.0, mlp_up_softcap=2.0,
        post_norm_eps=1e-6, rms_norm_eps=1e-6, _experts_implementation="eager")


def _experts(module, name, dtype=torch.float32, **sizes):
    experts = getattr(importlib.import_module(module), name)(_tiny(**sizes))
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return experts.to(dtype).requires_grad_(False)


def _routing(num_tokens):
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(num_tokens)])
    return ids, torch.rand(num_tokens, TOP_K)


def _run(experts, implementation, *args):
    experts.config._experts_implementation = implementation
    return experts(*args)


@pytest.mark.parametrize("module, name", list(_experts_classes()))
def test_experts_class(module, name):
    experts = _experts(module, name)
    ids, weights = _routing(7)
    hidden_states = torch.randn(7, HIDDEN) * 2
    expected = _run(experts, "eager", hidden_states, ids, weights)
    torch.testing.assert_close(_run(experts, "moe_xe", hidden_states, ids, weights), expected, rtol=1e-4, atol=1e-4)


def test_most_families_are_fused():
    """How many, not which: what comes new may have a gate of its own."""
    fused = [fused_activation(_experts(*parameters.values)) is not None for parameters in _experts_classes()]
    assert len(fused) > 60 and sum(fused) > 50


QWEN3 = ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts")
GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")
NEMOTRON = ("transformers.models.nemotron_h.modeling_nemotron_h", "NemotronHExperts")
INKLING2 = ("transformers.models.inkling2.modeling_inkling2", "Inkling2Experts")
MUSE_SPARK = ("transformers.models.muse_spark.modeling_muse_spark", "MuseSparkExperts")
REPRESENTATIVES = pytest.mark.parametrize("module, name", [QWEN3, GPT_OSS, NEMOTRON, INKLING2, MUSE_SPARK])


@REPRESENTATIVES
def test_ids_of_other_ranks_contribute_nothing(module, name):
    experts = _experts(module, name)
    ids, weights = _routing(7)
    hidden_states = torch.randn(7, HIDDEN)
    elsewhere = torch.rand(7, TOP_K) < 0.4
    elsewhere[3] = True
    expected = _run(experts, "eager", hidden_states, ids, weights.masked_fill(elsewhere, 0))
    out = _run(experts, "moe_xe", hidden_states, ids.masked_fill(elsewhere, EXPERTS), weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert not out[3].any()


@pytest.mark.few(2)
@REPRESENTATIVES
def test_bfloat16_experts(module, name):
    experts, (ids, weights) = _experts(module, name, torch.bfloat16), _routing(7)
    hidden_states = torch.randn(7, HIDDEN, dtype=torch.bfloat16)
    out, eager = (_run(experts, implementation, hidden_states, ids, weights) for implementation in ("moe_xe", "eager"))
    assert out.dtype == torch.bfloat16
    exact = _run(experts.float(), "eager", hidden_states.float(), ids, weights)
    error, eager_error = ((result - exact).norm() / exact.norm() for result in (out, eager))
    assert error < 0.01 and error < 1.1 * eager_error


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_odd_sizes(num_tokens):
    experts = _experts(*QWEN3, **ODD_SIZES)
    ids, weights = _routing(num_tokens)
    hidden_states = torch.randn(num_tokens, ODD_SIZES["hidden_size"])
    expected = _run(experts, "eager", hidden_states, ids, weights)
    torch.testing.assert_close(_run(experts, "moe_xe", hidden_states, ids, weights), expected, rtol=1e-4, atol=1e-4)


def test_float32_states_of_an_autocast_region():
    experts, (ids, weights) = _experts(*QWEN3, dtype=torch.bfloat16), _routing(5)
    out = _run(experts, "moe_xe", torch.randn(5, HIDDEN), ids, weights)
    assert out.dtype == torch.float32


# --------------------------------------------------------------------------------------------- gates, and compilation

@pytest.mark.parametrize("act, expected", [
    ("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_python", "gelu"), ("gelu_new", "gelu_tanh"),
    ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2"), ("quick_gelu", None), ("gelu_10", None), ("relu", None),
    ("mish", None), ("prelu", None)])
@pytest.mark.parametrize("module, name", [QWEN3, NEMOTRON])
def test_activation_is_recognised(module, name, act, expected):
    assert fused_activation(_experts(module, name, act=act)) == (None if expected is None else (expected, 1.0, None))


@pytest.mark.parametrize("act", ["quick_gelu", "prelu"])
@pytest.mark.parametrize("module, name", [QWEN3, NEMOTRON])
def test_other_activations_run_between_grouped_gemms(module, name, act):
    experts, (ids, weights) = _experts(module, name, act=act), _routing(7)
    hidden_states = torch.randn(7, HIDDEN)
    expected = _run(experts, "eager", hidden_states, ids, weights)
    torch.testing.assert_close(_run(experts, "moe_xe", hidden_states, ids, weights), expected, rtol=1e-4, atol=1e-4)


def test_gate_is_recognised_by_what_it_computes():
    """Nearly gpt-oss' gate is not gpt-oss' gate."""
    experts = _experts(*GPT_OSS)
    assert fused_activation(experts) == ("swiglu_oai", 1.702, 1.5)
    other = _experts(*GPT_OSS)
    other._apply_gate = lambda gate_up: type(other)._apply_gate(other, gate_up).clamp(max=3.0)
    assert fused_activation(other) is None


def test_a_class_of_ones_own():
    @use_experts_implementation(is_transposed=True, is_concatenated=False, has_bias=True)
    class Experts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            self.gate_up_proj = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE) / 8)
            self.gate_up_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE))
            self.down_proj = torch.nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) / 8)
            self.down_proj_bias = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN))

        def _apply_gate(self, gate_up):
            return gate_up[..., 0::2].tanh() * gate_up[..., 1::2]

        def forward(self, hidden_states, top_k_index, top_k_weights):
            x = hidden_states[:, None, None]
            h = self._apply_gate(x @ self.gate_up_proj[top_k_index] + self.gate_up_proj_bias[top_k_index][:, :, None])
            y = h @ self.down_proj[top_k_index] + self.down_proj_bias[top_k_index][:, :, None]
            return (y[:, :, 0] * top_k_weights[..., None]).sum(1)

    experts, (ids, weights) = Experts(_tiny()).requires_grad_(False), _routing(6)
    hidden_states = torch.randn(6, HIDDEN)
    expected = _run(experts, "eager", hidden_states, ids, weights)
    torch.testing.assert_close(_run(experts, "moe_xe", hidden_states, ids, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module, name", [GPT_OSS, *(pytest.param(*family, marks=pytest.mark.full) for family in (QWEN3, INKLING2))])
def test_experts_compile_without_graph_breaks(module, name):
    torch.compiler.reset()  # all families share one forward, and dynamo's limit of versions of it
    experts = _experts(module, name)
    experts.config._experts_implementation = "moe_xe"
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for num_tokens in (8, 6, 1):
        ids, weights = _routing(num_tokens)
        hidden_states = torch.randn(num_tokens, HIDDEN)
        expected = experts(hidden_states, ids, weights)
        torch.testing.assert_close(compiled(hidden_states, ids, weights), expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- registration

def test_register_is_idempotent():
    integration.register()
    integration.register()
    assert list(ALL_EXPERTS_FUNCTIONS).count("moe_xe") == 1
    assert ALL_EXPERTS_FUNCTIONS["moe_xe"] is integration.experts_forward


@pytest.mark.parametrize("missing, words", [("transformers", "not installed"),
                                            ("transformers.integrations.moe", f"found {transformers.__version__}")])
def test_register_without_transformers(monkeypatch, missing, words):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"needs transformers >= 5.23.*{re.escape(words)}"):
        integration.register()


def test_register_with_experts_that_say_too_little(monkeypatch):
    monkeypatch.setattr("transformers.integrations.moe.use_experts_implementation", lambda experts_class: experts_class)
    with pytest.raises(ImportError, match=f"needs transformers >= 5.23.*found {re.escape(transformers.__version__)}"):
        integration.register()


@pytest.fixture
def registered_again():
    """register() with other arguments is undone."""
    yield
    integration.register()


@pytest.mark.cpu_device
@torch.inference_mode()
def test_a_registered_configuration_is_that_of_all_experts(registered_again, launched):
    layers, (ids, weights) = [_experts(*QWEN3, **ODD_SIZES) for _ in range(2)], _routing(7)
    x = torch.randn(7, ODD_SIZES["hidden_size"])

    def outputs():
        return [_run(experts, "moe_xe", x, ids.int(), weights) for experts in layers]

    expected = outputs()
    assert {line.origin for line in launched()} == {"chosen"}
    integration.register(config=MoeConfig(tile(40), tile(28)))
    torch.testing.assert_close(outputs(), expected, rtol=1e-4, atol=1e-4)
    assert [line.config for line in launched()] == [str(tile(40)), str(tile(28))] * len(layers)
    integration.register()
    outputs()
    assert {line.origin for line in launched()} == {"chosen"}


@pytest.mark.usefixtures("fresh_tuner")
@pytest.mark.parametrize("act", [pytest.param("silu", marks=pytest.mark.full), "softplus"])     # test_blocks.py has fused ones
def test_registered_for_tuning(act, registered_again, launched):
    """Fused experts, and those around whose own gate grouped GEMMs run."""
    module, name = "transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts"
    experts, x, (ids, weights) = _experts(module, name), torch.randn(8, HIDDEN), _routing(8)
    if act != "silu":
        experts.act_fn = torch.nn.Softplus()
    expected = _run(experts, "moe_xe", x, ids, weights)
    launched()
    integration.register(autotune=True)
    torch.testing.assert_close(_run(experts, "moe_xe", x, ids, weights), expected, rtol=1e-4, atol=1e-4)
    assert [line.origin for line in launched()] == ["tuned", "tuned"]


def test_register_with_wrong_arguments():
    with pytest.raises(TypeError, match="config must be a MoeConfig, or None, got CpuConfig"):
        integration.register(config=tile(40))
    with pytest.raises(TypeError, match="autotune must be True or False, got 1"):
        integration.register(autotune=1)
    with pytest.raises(ValueError, match="config must be None with autotune=True"):
        integration.register(config=MoeConfig(), autotune=True)
