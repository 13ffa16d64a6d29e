"""moe_xe.nn's blocks against Transformers' with the same weights, and against the plain references in float64."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe import GemmConfigs, MoeConfig
from moe_xe.nn import DeepseekV3Block, Experts, GptOssBlock, Llama4Block, LoraExperts, MixtralBlock, Qwen3MoeBlock, reference
from moe_xe.nn.activations import activation_name, recognise
from moe_xe.ops import tuned
from moe_xe.plan.trials import trial_configs
from tests.ops.block.case import HIDDEN, INTERMEDIATE
from tests.ops.tiles import tile

transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM, Llama4TextMoe  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402


EXPERTS, TOP_K = 8, 3
SIZES = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=EXPERTS, top_k=TOP_K)


class Family:
    """A block of ours, Transformers' of the same numbers, and the reference."""

    def __init__(self, block, hf_block, config, reference, numbers, **hf_numbers):
        self.block, self.reference, self.numbers = block, reference, numbers
        self.make_hf = lambda: hf_block(config(
            hidden_size=HIDDEN, num_experts_per_tok=TOP_K, num_attention_heads=5, experts_implementation="eager",
            **hf_numbers))
        self.reference_numbers = {k: v for k, v in dict(numbers, top_k=TOP_K).items() if k != "shared_intermediate_size"}

    def ours(self, **options):
        return _random(self.block(**SIZES, **self.numbers, **options))

    def hf(self):
        return _random(self.make_hf())

    def expected(self, weights, hidden_states):
        weights = {name: tensor.double() for name, tensor in weights.items()}
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).double()
        return self.reference(weights, x, **self.reference_numbers).view(hidden_states.shape)


FAMILIES = {
    "qwen3_moe": Family(
        Qwen3MoeBlock, Qwen3MoeSparseMoeBlock, transformers.Qwen3MoeConfig, reference.qwen3_moe,
        dict(norm_topk_prob=False), moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, norm_topk_prob=False),
    "mixtral": Family(
        MixtralBlock, MixtralSparseMoeBlock, transformers.MixtralConfig, reference.mixtral, {},
        intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
    "gpt_oss": Family(
        GptOssBlock, GptOssMLP, transformers.GptOssConfig, reference.gpt_oss, dict(alpha=1.702, limit=0.7),
        intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, swiglu_alpha=1.702, swiglu_limit=0.7),
    "deepseek_v3": Family(
        DeepseekV3Block, DeepseekV3MoE, transformers.DeepseekV3Config, reference.deepseek_v3,
        dict(shared_intermediate_size=2 * INTERMEDIATE, num_groups=4, topk_groups=2, routed_scaling_factor=2.5),
        moe_intermediate_size=INTERMEDIATE, n_routed_experts=EXPERTS, n_shared_experts=2, n_group=4, topk_group=2,
        routed_scaling_factor=2.5),
    "llama4": Family(
        Llama4Block, Llama4TextMoe, transformers.Llama4TextConfig, reference.llama4,
        dict(shared_intermediate_size=INTERMEDIATE), intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS),
}
family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def _random(block):
    """Every parameter and buffer of a size at which it matters."""
    for tensor in [*block.parameters(), *block.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
    return block.eval().requires_grad_(False)


def _outputs(result):
    return result if isinstance(result, tuple) else (result,)


# ---------------------------------------------------------------------------------------------- against Transformers

@family
@pytest.mark.parametrize("batch, sequence", [(2, 4), (1, 1), (3, 1)])
def test_agrees_with_transformers(family, batch, sequence):
    hf = family.hf()
    block = family.block.from_hf(hf)
    hidden_states = torch.randn(batch, sequence, HIDDEN)
    results, expected = _outputs(block(hidden_states)), _outputs(hf(hidden_states.clone()))
    assert len(results) == len(expected)
    for ours, theirs in zip(results, expected):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@family
def test_from_hf_shares_every_tensor(family):
    hf = family.hf().train()
    hf.experts.down_proj.requires_grad_(True)
    block = family.block.from_hf(hf)
    ours, theirs = ({name: tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
                    for module in (block, hf))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert block.training
    assert hf.experts.down_proj.requires_grad and not hf.experts.gate_up_proj.requires_grad


@family
def test_state_dicts_are_interchangeable(family):
    hf, block, back = family.hf(), family.ours(), family.make_hf()
    block.load_state_dict(hf.state_dict())
    back.load_state_dict(block.state_dict())
    assert list(back.state_dict()) == list(hf.state_dict())
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in hf.state_dict().items())
    hidden_states = torch.randn(1, 4, HIDDEN)
    out, expected = _outputs(block(hidden_states))[0], _outputs(hf(hidden_states.clone()))[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_llama4_model_with_replaced_blocks():
    """Transformers does not let Llama-4's experts be chosen; its blocks can be replaced."""
    config = transformers.Llama4TextConfig(
        vocab_size=96, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model, prompt = Llama4ForCausalLM(config).eval(), torch.randint(2, 96, (2, 4))
    logits, tokens = model(prompt).logits, model.generate(prompt, max_new_tokens=8, do_sample=False)
    replaced = 0
    for layer in model.model.layers:
        if isinstance(layer.feed_forward, Llama4TextMoe):
            layer.feed_forward = Llama4Block.from_hf(layer.feed_forward)
            replaced += 1
    assert replaced
    torch.testing.assert_close(model(prompt).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), tokens)


# ------------------------------------------------------------------------------------------ against the references

@family
def test_agrees_with_reference(family, device):
    block = family.ours().to(device)
    hidden_states = torch.randn(2, 4, HIDDEN, device=device)
    out = _outputs(block(hidden_states))[0].view(hidden_states.shape)
    expected = family.expected(block.state_dict(), hidden_states)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@family
def test_transformers_agrees_with_reference(family):
    hf, hidden_states = family.hf(), torch.randn(2, 4, HIDDEN)
    out = _outputs(hf(hidden_states.clone()))[0].view(hidden_states.shape)
    torch.testing.assert_close(out.double(), family.expected(hf.state_dict(), hidden_states), rtol=1e-4, atol=1e-4)


@pytest.mark.few(1)
@family
def test_bfloat16(family, device):
    """The bound is on the median token: a router's rounding may choose another expert."""
    block = family.ours(dtype=torch.bfloat16).to(device)
    hidden_states = torch.randn(1, 8, HIDDEN, device=device, dtype=torch.bfloat16)
    out = _outputs(block(hidden_states))[0].view(hidden_states.shape)
    assert out.dtype == torch.bfloat16
    expected = family.expected(block.state_dict(), hidden_states)
    error = (out - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 0.02


@pytest.mark.few(1)
@family
def test_compiles_without_graph_breaks(family):
    block = family.ours()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for num_tokens in (6, 1):
        hidden_states = torch.randn(1, num_tokens, HIDDEN)
        for ours, expected in zip(_outputs(compiled(hidden_states)), _outputs(block(hidden_states))):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full       # tests/ops/block/test_fused_moe.py has some
@settings(settings.get_profile("compiling"), suppress_health_check=list(HealthCheck))
@given(hidden_size=st.integers(1, 70), intermediate_size=st.integers(1, 40), num_experts=st.integers(1, 9),
       data=st.data())
def test_any_sizes(hidden_size, intermediate_size, num_experts, data):
    top_k, num_tokens = data.draw(st.integers(1, num_experts)), data.draw(st.integers(1, 9))
    block = _random(Qwen3MoeBlock(hidden_size, intermediate_size, num_experts, top_k, activation="gelu"))
    x = torch.randn(num_tokens, hidden_size)
    weights = {name: tensor.double() for name, tensor in block.state_dict().items()}
    expected = reference.qwen3_moe(weights, x.double(), top_k=top_k, activation=torch.nn.functional.gelu)
    torch.testing.assert_close(block(x[None])[0].double(), expected, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- what is refused

def test_from_hf_refuses_another_layout():
    with pytest.raises(TypeError, match="laid out as Transformers' MixtralSparseMoeBlock, got GptOssMLP"):
        MixtralBlock.from_hf(FAMILIES["gpt_oss"].hf())
    with pytest.raises(TypeError, match="laid out as Transformers' DeepseekV3MoE, got Linear"):
        DeepseekV3Block.from_hf(torch.nn.Linear(2, 2))
    with_bias = FAMILIES["qwen3_moe"].hf()
    with_bias.gate.bias = torch.nn.Parameter(torch.zeros(EXPERTS))
    with pytest.raises(TypeError, match="must hold the tensors of Transformers' Qwen3MoeSparseMoeBlock.*gate.bias"):
        Qwen3MoeBlock.from_hf(with_bias)


def test_from_hf_refuses_other_activations():
    hf = FAMILIES["mixtral"].hf()
    hf.experts.act_fn = torch.nn.Mish()
    with pytest.raises(ValueError, match="experts.act_fn must compute one of silu, gelu.*Mish"):
        MixtralBlock.from_hf(hf)


def test_activations_are_recognised_by_what_they_compute():
    assert activation_name(torch.nn.GELU(), "act") == "gelu"
    silu = torch.nn.functional.silu
    assert recognise(lambda x: silu(x[:, 0::2]) * x[:, 1::2], gated=True) is None
    assert recognise(lambda x: silu(x[:, 0::2]) * x[:, 1::2], gated=True, interleaved=True) is not None
    assert recognise(lambda x: silu(x).clamp(max=2.0), gated=False, limits=[2.0]) is None


# ------------------------------------------------------------------------------------------------ configurations

MOE = MoeConfig(tile(40), GemmConfigs(forward=tile(28)))


@pytest.mark.cpu_device
@pytest.mark.few(1)
@family
def test_blocks_take_configurations(family, launched):
    hf, hidden_states = family.hf(), torch.randn(2, 4, HIDDEN)
    block, plain = family.block.from_hf(hf, config=MOE), family.block.from_hf(hf)
    assert family.ours(config=MOE).experts.config is MOE and family.ours(autotune=True).experts.autotune is True
    for ours, other in zip(_outputs(block(hidden_states)), _outputs(plain(hidden_states))):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    lines = launched()
    assert [line.config for line in lines if line.origin == "given"] == [str(tile(40)), str(tile(28))]
    assert {line.origin for line in lines} == {"given", "chosen"}


@pytest.mark.usefixtures("fresh_tuner")
@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.full)])
def test_blocks_are_tuned(name, launched, monkeypatch):
    monkeypatch.setattr(tuned, "trial_configs", lambda *arguments: trial_configs(*arguments)[:1])
    hf, hidden_states = FAMILIES[name].hf(), torch.randn(2, 4, HIDDEN)
    block = FAMILIES[name].block.from_hf(hf, autotune=True)
    torch.testing.assert_close(block(hidden_states), FAMILIES[name].block.from_hf(hf)(hidden_states), rtol=1e-5, atol=1e-5)
    origins = [line.origin for line in launched()]
    assert origins[0] == "tuned" and origins.count("tuned") == origins.count("chosen") == 2


def test_experts_with_wrong_configurations():
    with pytest.raises(TypeError, match="config must be a MoeConfig, or None, got CpuConfig"):
        FAMILIES["qwen3_moe"].ours(config=tile(40))(torch.randn(1, 2, HIDDEN))
    with pytest.raises(ValueError, match="config must be None with autotune=True"):
        FAMILIES["qwen3_moe"].ours(config=MOE, autotune=True)(torch.randn(1, 2, HIDDEN))


@pytest.mark.cpu_device
def test_adapted_experts_keep_the_configuration(launched):
    experts = _random(Experts(EXPERTS, HIDDEN, INTERMEDIATE, config=MOE))
    lora = LoraExperts(experts, 8)
    assert lora.config is MOE and LoraExperts(experts, 4, config=MoeConfig()).config == MoeConfig()
    assert LoraExperts(experts, 4, autotune=True).config is None
    lora(torch.randn(5, HIDDEN), torch.rand(5, TOP_K), torch.randint(EXPERTS, (5, TOP_K)))
    assert [line.config for line in launched() if line.origin == "given"] == [str(tile(40)), str(tile(28))]
