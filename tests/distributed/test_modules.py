"""moe_xe.nn's blocks with their experts on several ranks, with and without FSDP2: outputs and gradients are those of one process."""
from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from moe_xe.distributed import expert_parallel_moe
from moe_xe.nn import DeepseekV3Block, ExpertParallel, GptOssBlock, LoraExperts, Qwen3MoeBlock
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, HIDDEN, INTERMEDIATE, assert_close

TOP_K, TOKENS, RANKS = 3, 5, 4
LIMITS = tuple(2 * limit for limit in GRADIENT_LIMITS[torch.float32])       # one process rounds, too
ROUTER_LIMITS = 1e-5, 1e-5      # of which each gradient is a difference of what the experts of a token gave


def make_block(kind: str, num_experts: int) -> torch.nn.Module:
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=num_experts, top_k=TOP_K)
    if kind == "gpt_oss":
        return GptOssBlock(**sizes)
    if kind == "deepseek_v3":
        return DeepseekV3Block(**sizes, shared_intermediate_size=INTERMEDIATE)
    block = Qwen3MoeBlock(**sizes)
    if kind == "quantised":
        block.experts.quantize("fp8_e4m3", (HIDDEN, INTERMEDIATE))
    if kind == "lora":
        block.experts = LoraExperts(block.experts, r=8)
    return block


def random_block(kind: str, num_experts: int) -> torch.nn.Module:
    block = make_block(kind, num_experts)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=parameter.shape[-1]**-0.5)
    if kind == "quantised":     # of other numbers than those that ranks make
        block.experts.set_quantized(**{name: type(w).quantize(2 * w.dequantize(), w.format, w.group) for name, w in (
            ("gate_up_proj", block.experts.gate_up_proj.weight), ("down_proj", block.experts.down_proj.weight))})
        block.load_state_dict(block.state_dict())       # as ranks do, so that kernels are the same
    return block


def outcome(block, x: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    """The output, and the gradients of this share of the sum of its squares."""
    x = x.clone().requires_grad_()
    out = block(x[None])
    out = (out[0] if isinstance(out, tuple) else out)[0]
    (share * out.square().sum()).backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    found = {"out": out.detach(), "x": x.grad} | gradients
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in found.items()}


@functools.cache
def mesh_of(*sizes: int) -> dist.DeviceMesh:
    return dist.init_device_mesh("cpu", sizes, mesh_dim_names=("fsdp", "ep")[-len(sizes):])


def load(block, state: dict) -> None:
    """What one process saved, which is what a process would find again."""
    full = StateDictOptions(full_state_dict=True)
    set_model_state_dict(block, dict(state), options=full)      # changes the dict
    found = get_model_state_dict(block, options=full)
    assert found.keys() == state.keys() == block.state_dict().keys()
    assert all(torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in state.items())


def on_rank(rank: int, kind: str, num_experts: int, state: dict, x: torch.Tensor, sharding: str, options: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    block, whole = make_block(kind, num_experts), mesh_of(RANKS)
    in_torch = kind not in ("lora", "quantised")        # set_model_state_dict does not follow LoraExperts' keys, and gloo sends no float8
    if not in_torch:
        block.load_state_dict(state)
    if sharding != "fsdp":
        experts_mesh = whole if sharding == "experts" else mesh_of(2, 2)["ep"]
        parallelize_module(block, experts_mesh, {"experts": ExpertParallel(**options)})
    if sharding == "fsdp and experts":
        fully_shard(block.experts, mesh=mesh_of(2, 2)["fsdp"])
        block.experts.set_gradient_divide_factor(RANKS)
        block.experts.set_force_sum_reduction_for_comms(True)
    if sharding != "experts":
        fully_shard(block, mesh=whole)
    if in_torch:
        load(block, state)
    return outcome(block, x[rank], 1.0 if sharding == "experts" else RANKS)


def check(kind: str, sharding: str, num_experts: int, **options) -> None:
    block, x = random_block(kind, num_experts), torch.randn(RANKS, TOKENS, HIDDEN)
    state = {name: value.detach() for name, value in block.state_dict().items()}
    expected = outcome(block, x.flatten(0, 1), 1.0)
    found = ranks(RANKS).run(on_rank, kind, num_experts, state, x, sharding, options)
    for name, value in expected.items():
        assert all(part.keys() == expected.keys() for part in found)
        if name in ("out", "x"):
            # the gradient of x is not FSDP's to average
            actual = torch.cat([part[name] for part in found]) / (RANKS if name == "x" and sharding != "experts" else 1)
        elif sharding == "experts" and not name.startswith("experts."):
            actual = sum(part[name] for part in found)      # of modules that each rank has a copy of
        else:
            actual = found[0][name]
        assert_close(actual, value.double(), ROUTER_LIMITS if name.startswith(("gate.", "router.")) else LIMITS, name)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "lora", "quantised"])
def test_experts_on_ranks(kind):
    """Five experts: the ranks have 2, 2, 1 and 0."""
    check(kind, "experts", 5)


@pytest.mark.parametrize("kind, sharding", [("qwen3_moe", "fsdp"), ("gpt_oss", "fsdp and experts"), ("lora", "fsdp and experts")])
def test_fsdp(kind, sharding):
    check(kind, sharding, 8)


def test_exchange_of_the_style():
    """Rows in eight bits: near the exact ones, and not equal to them."""
    block, x = random_block("qwen3_moe", 4), torch.randn(RANKS, TOKENS, HIDDEN)
    found = [torch.cat([part["out"] for part in ranks(RANKS).run(on_rank, "qwen3_moe", 4, dict(block.state_dict()), x, "experts", options)])
             for options in ({}, dict(chunks=2), dict(wire="int8"))]
    assert_close(found[1], found[0].double(), LIMITS, "chunks")
    error = (found[2] - found[0]).norm() / found[0].norm()
    assert 1e-4 < error < 3e-2


def before_and_after(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(rank)
    block = make_block("gpt_oss", 3)
    before = block.experts.down_proj.detach().clone()
    parallelize_module(block, mesh_of(RANKS), {"experts": ExpertParallel()})
    return before, block.experts.down_proj.full_tensor()


def test_values_are_those_of_the_first_rank():
    found = ranks(RANKS).run(before_and_after)
    assert not torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(after, found[0][0]) for _, after in found)


def refused(rank: int) -> list[str]:
    whole, square = mesh_of(RANKS), mesh_of(2, 2)
    block, x = make_block("qwen3_moe", 4), torch.randn(1, HIDDEN)
    w13, w2 = torch.randn(4, 2 * INTERMEDIATE, HIDDEN), torch.randn(4, HIDDEN, INTERMEDIATE)
    routing = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    spread = distribute_tensor(w13, whole, [Shard(0)])
    attempts = [
        lambda: parallelize_module(block, whole, {"gate": ExpertParallel()}),
        lambda: ExpertParallel()._apply(block.experts, square),
        lambda: expert_parallel_moe(x, distribute_tensor(w13, whole, [Replicate()]), w2, *routing, group=None),
        lambda: expert_parallel_moe(x, spread, distribute_tensor(w2, whole, [Shard(1)]), *routing, group=whole),
        lambda: expert_parallel_moe(x, spread, distribute_tensor(w2, square, [Replicate(), Shard(0)]), *routing, group=None),
        lambda: expert_parallel_moe(x, spread, w2, *routing, group=square["ep"]),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as raised:
            attempt()
        messages.append(str(raised.value))
    return messages


def test_errors():
    for messages in ranks(RANKS).run(refused):
        style, dimensions, replicated, columns, two, other = messages
        assert style == "ExpertParallel is for moe_xe.nn.Experts and LoraExperts, got Router"
        assert dimensions.startswith("mesh must have one dimension, got DeviceMesh")
        assert replicated.startswith("w13 must be Shard(0) over a DeviceMesh of one dimension, got (Replicate(),)")
        assert columns.startswith("w2 must be Shard(0)") and two.startswith("w2 must be Shard(0)")
        assert other.startswith("w13 must be spread over the group's ranks, [")
