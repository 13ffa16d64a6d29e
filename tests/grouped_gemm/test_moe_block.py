"""The fused blocks against Transformers' own with the same parameters."""
import itertools

import pytest
import torch
from torch import nn

import moe_xe
from moe_xe.grouped_gemm.reference.moe_block import Llama4MoeFusedGroupedGEMMBlock, Qwen3MoeFusedGroupedGEMMBlock
from moe_xe.ops import tuned
from moe_xe.plan.trials import trial_configs
from tests.ops.block.case import HIDDEN, INTERMEDIATE

pytest.importorskip("transformers", minversion="5.23")
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe  # noqa: E402
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402


def randomized(block: nn.Module, dtype=torch.float32) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.15)
    return block.to(dtype).eval()


def qwen3(top_k=3, norm_topk_prob=True, dtype=torch.float32):
    return randomized(Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_attention_heads=5, num_experts=7, num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob)), dtype)


def llama4(top_k=1, dtype=torch.float32):
    return randomized(Llama4TextMoe(Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=5, num_local_experts=5, num_experts_per_tok=top_k)), dtype)


OPTIONS = [dict(permute_x=x, permute_y=y, fuse_mul_post=fuse) for x, y, fuse in itertools.product([False, True], repeat=3)
           if y or not fuse]


@pytest.mark.few(2)
@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_qwen3(options):
    block = qwen3()
    x = torch.randn(2, 15, HIDDEN)
    torch.testing.assert_close(Qwen3MoeFusedGroupedGEMMBlock.from_hf(block, **options)(x), block(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("top_k, norm_topk_prob, shape", [
    pytest.param(1, False, (1, 1), marks=pytest.mark.full), pytest.param(2, True, (3, 5), marks=pytest.mark.full), (7, False, (1, 40))])
def test_qwen3_routings(top_k, norm_topk_prob, shape, monkeypatch):
    monkeypatch.setattr(tuned, "trial_configs", lambda *arguments: trial_configs(*arguments)[:1])
    block = qwen3(top_k, norm_topk_prob)
    x = torch.randn(*shape, HIDDEN)
    actual = Qwen3MoeFusedGroupedGEMMBlock.from_hf(block, autotune=True)(x)
    torch.testing.assert_close(actual, block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.few(2)
@torch.no_grad()
@pytest.mark.parametrize("permute_x, permute_y", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("top_k", [1, 2])
def test_llama4(permute_x, permute_y, top_k):
    block = llama4(top_k)
    x = torch.randn(2, 15, HIDDEN)
    actual, logits = Llama4MoeFusedGroupedGEMMBlock.from_hf(block, permute_x=permute_x, permute_y=permute_y)(x)
    expected, expected_logits = block(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, expected_logits)


@torch.no_grad()
def test_qwen3_in_bfloat16():
    x, block = torch.randn(3, 11, HIDDEN, dtype=torch.bfloat16), qwen3(dtype=torch.bfloat16)
    torch.testing.assert_close(Qwen3MoeFusedGroupedGEMMBlock.from_hf(block)(x), block(x), rtol=3e-2, atol=3e-2)


@pytest.mark.full
@torch.no_grad()
def test_llama4_in_bfloat16():
    x, block = torch.randn(3, 11, HIDDEN, dtype=torch.bfloat16), llama4(dtype=torch.bfloat16)
    torch.testing.assert_close(Llama4MoeFusedGroupedGEMMBlock.from_hf(block)(x)[0], block(x)[0], rtol=3e-2, atol=3e-2)


def test_parameters_are_shared():
    block = qwen3()
    fused = Qwen3MoeFusedGroupedGEMMBlock.from_hf(block)
    own, theirs = dict(fused.named_parameters()), dict(block.named_parameters())
    assert own.keys() == theirs.keys() and all(own[name] is theirs[name] for name in own)
    fused.load_state_dict(block.state_dict())


@torch.no_grad()
def test_configurations_of_the_two_gemms():
    block = qwen3()
    config = moe_xe.explain(torch.randn(3, HIDDEN), block.experts.gate_up_proj, torch.tensor([3] + [0] * 6)).config
    x = torch.randn(1, 30, HIDDEN)
    torch.testing.assert_close(Qwen3MoeFusedGroupedGEMMBlock.from_hf(block, kernel_configs_fwd=(config, None))(x), block(x),
                               rtol=1e-4, atol=1e-5)


def test_wrong_blocks_and_options():
    with pytest.raises(TypeError, match="moe_block must be Transformers' Qwen3MoeSparseMoeBlock, .* Llama4TextMoe has no gate.weight"):
        Qwen3MoeFusedGroupedGEMMBlock.from_hf(llama4())
    with pytest.raises(TypeError, match="moe_block must be Transformers' Llama4TextMoe, .* Linear has no router.weight"):
        Llama4MoeFusedGroupedGEMMBlock.from_hf(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="fuse_mul_post needs permute_y=True"):
        Qwen3MoeFusedGroupedGEMMBlock.from_hf(qwen3(), permute_y=False, fuse_mul_post=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("options", OPTIONS[::-1], ids=str)
def test_gradients(options):
    """Of the inputs and of every parameter, the router's included."""
    block = qwen3()
    ours = Qwen3MoeFusedGroupedGEMMBlock.from_hf(block, **options)
    x, gradient = torch.randn(2, 15, HIDDEN), torch.randn(2, 15, HIDDEN)
    gradients = []
    for way in (ours, block):
        inputs = x.clone().requires_grad_()
        parameters = dict(block.named_parameters())
        found = torch.autograd.grad(way(inputs), [inputs, *parameters.values()], gradient)
        gradients.append(dict(zip(["x", *parameters], found)))
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)
