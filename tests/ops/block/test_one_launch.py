"""The block in one launch against the same block in four, bit by bit."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_xe import Fusions
from moe_xe.device import facts_of, queue_for
from moe_xe.ops import launch
from moe_xe.ops.block import stages
from moe_xe.ops.calls import known_calls

from ..threads import assert_threads_agree
from .case import INTERMEDIATE, assert_right, make, make_shared, reference, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BIASES = (F32, F32)
FOUR = Fusions(launches=False)


@pytest.fixture
def launches(monkeypatch) -> list:
    """Gets an entry for each block that is one launch."""
    seen, launch_block = [], stages.launch_block
    monkeypatch.setattr(stages, "launch_block", lambda *args: (seen.append(args), launch_block(*args))[1])
    return seen


def compare(block: dict, device, launches: list, one: bool = True) -> torch.Tensor:
    """Results of both, and of a call that was made before, into poison. one: whether it should be one launch."""
    known_calls().clear()
    results = []
    for fusions in (Fusions(), Fusions(), FOUR):
        out = torch.full_like(block["hidden_states"], float("nan"), device=device)
        results.append(run(block, device, fusions, out))
    assert bool(launches) is one, "the number of launches"
    launches.clear()
    assert all(torch.equal(result.view(torch.uint8), results[-1].view(torch.uint8)) for result in results)
    return results[0]


OPTIONS = {
    "plain": dict(),
    "everything": dict(weight_layout="ekn", dtype=BF16, bias=(F32, BF16), weights_dtype=BF16, ids_dtype=torch.int64, top_k=10,
                       routed_scaling_factor=2.5),
    "gpt-oss": dict(activation="swiglu_oai", interleaved=True, limit=0.7, bias=BIASES),
    "on input": dict(weight_on_input=True, bias=BIASES),
    "on input, f16": dict(weight_on_input=True, dtype=F16, weights_dtype=F16, bias=(F16, F32)),
    "no gate": dict(weight_layout="ekn", activation="relu2", gated=False),
    "one slot": dict(top_k=1, bias=BIASES),
    "one slot on input": dict(top_k=1, weight_layout="ekn", weight_on_input=True, dtype=BF16),
}


@pytest.mark.parametrize("tokens, experts", [(1, 6), (64, 6), pytest.param(7, 512, marks=pytest.mark.full), (33, 1)])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in ("everything", "gpt-oss", "on input"))) for name in OPTIONS])
def test_equals_four_launches(name, tokens, experts, device, launches):
    block = make(tokens, experts, **OPTIONS[name])
    assert_right(compare(block, device, launches), reference(**block))


@pytest.mark.parametrize("weights", [pytest.param(None, marks=pytest.mark.full), torch.rand(31)], ids=["", "weights"])
@pytest.mark.parametrize("size", [INTERMEDIATE, pytest.param(2 * INTERMEDIATE, marks=pytest.mark.full)])
def test_shared_experts(size, weights, device, launches):
    for tokens in (1, 31):
        shared = make_shared(size, weights=None if weights is None else weights[:tokens])
        block = make(tokens, bias=BIASES, shared=shared, routed_scaling_factor=1.5)
        assert_right(compare(block, device, launches), reference(**block))


@pytest.mark.full
def test_a_shared_expert_with_launches_of_its_own(device, launches):
    compare(make(5, bias=BIASES, shared=make_shared(INTERMEDIATE + 4)), device, launches, one=False)


def test_how_many_pairs_there_may_be(device, launches):
    for tokens, one in ((341, True), (342, False)):      # times 3: 1023 and 1026
        compare(make(tokens), device, launches, one)


@pytest.mark.parametrize("top_k", [1, 3])
def test_dropped_and_crowded(top_k, device, launches):
    """No pair at all, one expert with everything, a token without experts."""
    block = make(40, top_k=top_k, bias=BIASES if top_k == 1 else None)      # as above: the same kernels
    for expert in (-1, 6, 4):
        block["topk_ids"].fill_(expert)
        compare(block, device, launches)
    block["topk_ids"][3] = 2**31 - 1
    assert (compare(block, device, launches)[3] == 0).all()


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.full), 3])
def test_experts_of_other_ranks(top_k, device, launches):
    expert_map = torch.full((9,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.tensor([3, 0, 2, 1], dtype=torch.int32)
    block = make(29, 9, top_k)
    compare(block | dict(w13=block["w13"][:4], w2=block["w2"][:4], expert_map=expert_map), device, launches)


@pytest.mark.cpu_device
@pytest.mark.parametrize("options", [
    dict(), pytest.param(dict(weight_layout="ekn", dtype=BF16, bias=BIASES, activation="swiglu_oai", interleaved=True), marks=pytest.mark.full)],
    ids=["plain", "interleaved"])
def test_k_in_parts(options, launches, launched, monkeypatch):
    """On so many cores that both GEMMs' K is shared out; again and again, since who comes last differs."""
    target = replace(launch.target_of(facts_of(queue_for(torch.device("cpu")))), cores=600)
    for module in (launch, stages):
        monkeypatch.setattr(module, "target_of", lambda facts: target)
    block = make(2, hidden=525, intermediate=1030, **options)
    block["topk_ids"][:] = torch.tensor([[4, 1, 0], [4, 2, 1]])
    result = compare(block, torch.device("cpu"), launches)
    assert all(" splits" in gemm.config for gemm in launched())
    assert_right(result, reference(**block))
    for _ in range(30):
        assert torch.equal(run(block, torch.device("cpu")), result)


def test_many_runs_of_several_threads(device):
    """Work-groups of several launches at once wait for their own only."""
    blocks = [make(tokens, 12) for tokens in (1, 2, 5, 17)]
    expected = [run(block, device, FOUR) for block in blocks]
    assert_threads_agree(lambda block: run(block, device), blocks, expected, rounds=200 if device.type == "cpu" else 5)
