"""Transformers' models with their experts on several ranks: logits and a training step's gradients are those of one process."""
from __future__ import annotations

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from torch.distributed import init_device_mesh  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402
from transformers.distributed.expert_parallel import apply_expert_parallelism  # noqa: E402
from transformers.distributed.utils import TransformersDeviceMesh  # noqa: E402

from moe_xe.integrations.transformers import register  # noqa: E402
from tests.distributed.processes import ranks  # noqa: E402
from tests.integrations.test_transformers_fp8 import expected_of, fp8_experts  # noqa: E402


HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 64, 32, 8, 3, 61      # those of tests/integrations
MODELS = {
    "Qwen3Moe": dict(num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, norm_topk_prob=True),
    "GptOss": dict(num_local_experts=EXPERTS, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
}


def make_model(name: str, implementation: str):
    config = getattr(transformers, name + "Config")(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None, num_experts_per_tok=TOP_K,
        initializer_range=0.2, tie_word_embeddings=False, intermediate_size=INTERMEDIATE, **MODELS[name])
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation).train()


def random_state(name: str) -> dict[str, torch.Tensor]:
    """Zeros and ones of an initialisation hide what they multiply."""
    model = make_model(name, "eager")
    return {key: value + 0.1 * torch.randn_like(value) for key, value in model.state_dict().items()}


@functools.cache
def mesh_of(fsdp: int, tp: int, ep: int) -> TransformersDeviceMesh:
    """What from_pretrained makes, on CPUs whatever else the machine has."""
    return TransformersDeviceMesh(
        init_device_mesh("cpu", (1, 1, fsdp, tp), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp")),
        init_device_mesh("cpu", (1, 1, fsdp * tp // ep, ep), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep")))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def step(model, prompt: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits without a gradient, and the gradients of a training step."""
    with torch.no_grad():
        logits = whole(model(prompt, use_cache=False).logits)
    model(prompt, labels=prompt, use_cache=False).loss.backward()
    return logits, {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def step_of_rank(rank: int, name: str, state: dict, prompts: torch.Tensor, implementation: str, sizes: dict):
    register()
    model = make_model(name, "moe_xe")
    model.load_state_dict(state)
    config = DistributedConfig(**sizes, ep_implementation=implementation)
    mesh = mesh_of(config.fsdp_size, config.tp_size, config.ep_size)
    model = type(model).maybe_distribute_model(model, config, mesh)
    return step(model, prompts.chunk(config.fsdp_size)[rank // config.tp_size])


def check(name: str, state: dict, prompts: torch.Tensor, implementation: str, **sizes: int) -> None:
    model = make_model(name, "eager")
    model.load_state_dict(state)
    expected, expected_gradients = step(model, prompts)
    tp, fsdp = sizes.get("tp_size", 1), sizes.get("fsdp_size", 1)
    found = ranks(tp * fsdp).run(step_of_rank, name, state, prompts, implementation, sizes)
    for rank, (logits, gradients) in enumerate(found):
        torch.testing.assert_close(logits, expected.chunk(fsdp)[rank // tp], rtol=1e-4, atol=1e-4)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in expected_gradients.items():
            rms = gradient.square().mean().sqrt()
            assert rms > 0 and (gradients[key] - gradient).abs().max() <= 1e-4 * rms, (rank, key)


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (4, 11))


FULL = pytest.mark.full


@pytest.mark.parametrize("name, implementation, sizes", [
    ("Qwen3Moe", "moe_xe", dict(fsdp_size=2, ep_size=2)),
    ("GptOss", "moe_xe", dict(tp_size=2, ep_size=2)),
    ("Qwen3Moe", "moe_xe", dict(fsdp_size=2, tp_size=2, ep_size=4)),
    ("GptOss", "moe_xe", dict(fsdp_size=4, ep_size=2)),
    ("GptOss", "all_to_all", dict(fsdp_size=2, ep_size=2)),
    ("Qwen3Moe", "all_reduce", dict(tp_size=2, ep_size=2)),
    pytest.param("GptOss", "moe_xe", dict(fsdp_size=4, ep_size=4), marks=FULL),
    pytest.param("Qwen3Moe", "moe_xe", dict(fsdp_size=4, ep_size=4), marks=FULL),
    pytest.param("Qwen3Moe", "moe_xe", dict(fsdp_size=4, ep_size=2), marks=FULL),
    pytest.param("GptOss", "auto", dict(fsdp_size=2, tp_size=2, ep_size=2), marks=FULL),
    pytest.param("Qwen3Moe", "auto", dict(tp_size=2, ep_size=2), marks=FULL),
])
@pytest.mark.few(2)
def test_model_equals_one_process(name, implementation, sizes, prompts):
    """With moe_xe's own exchange, and with its experts under Transformers' ones."""
    check(name, random_state(name), prompts, implementation, **sizes)


def test_ranks_without_rows(prompts):
    """The router chooses the same three of eight experts for all tokens."""
    state = random_state("GptOss")
    for key in state:
        if key.endswith("router.bias"):
            state[key][TOP_K:] -= 1000
    check("GptOss", state, prompts[:, :3], "moe_xe", fsdp_size=2, ep_size=2)


def fp8_of_rank(rank: int, state: dict, x, ids, weights) -> torch.Tensor:
    holder = torch.nn.ModuleDict({"experts": fp8_experts(block_size=(16, 32))})
    holder.load_state_dict(state)
    mesh = mesh_of(2, 1, 2)
    plan = dict.fromkeys(state, "grouped_gemm") | {"experts": "ep_dispatch_experts"}
    apply_expert_parallelism(holder, mesh.get_mesh("ep"), mesh.get_mesh("tp"), plan, "moe_xe")
    assert all(parameter.to_local().shape[0] == parameter.shape[0] // 2 for parameter in holder.parameters())
    return holder["experts"](x[rank], ids[rank], weights[rank])


@torch.inference_mode()
def test_fp8_experts():
    experts, x = fp8_experts(block_size=(16, 32)), torch.randn(2, 7, 64)
    ids, weights = torch.rand(2, 7, experts.num_experts).topk(TOP_K).indices, torch.rand(2, 7, TOP_K)
    expected = torch.stack([expected_of(experts, *of_rank) for of_rank in zip(x, ids, weights)])
    state = {f"experts.{name}": value for name, value in experts.state_dict().items()}
    found = torch.stack(ranks(2).run(fp8_of_rank, state, x, ids, weights))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def refused(rank: int, implementation: str) -> None:
    register()
    model = make_model("Qwen3Moe", implementation)
    type(model).maybe_distribute_model(model, DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="moe_xe"), mesh_of(2, 1, 2))


def test_other_experts_are_refused():
    for outcome in ranks(2).outcomes(refused, "eager"):
        assert isinstance(outcome, ValueError)
        assert str(outcome) == 'experts_implementation must be "moe_xe" for ep_implementation="moe_xe", got \'eager\''
