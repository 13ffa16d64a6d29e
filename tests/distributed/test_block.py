"""expert_parallel_moe on several ranks is the block of one process, and so are its gradients."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_xe import QuantizedWeight
from tests.distributed.case import block, check
from tests.distributed.processes import ranks
from tests.ops.block.case import make_shared
from tests.ops.lora.test_lora_moe import with_adapters

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, EXPERTS = (9, 0, 17, 5), (3, 1, 2, 1)
REPLICAS = [[0, 3, 1], [2, 0], [], [0, 4, 2, 1]]


@pytest.mark.parametrize("dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.full)])
def test_equals_one_process(dtype):
    """Tokens and experts are spread unevenly."""
    check(ranks(4), block(TOKENS, EXPERTS, dtype=dtype), TOKENS, EXPERTS)


@pytest.mark.parametrize("case", [dict(bias=(F32, F32), activation="swiglu_oai", interleaved=True, limit=1.5),
                                  dict(weight_layout="ekn", weight_on_input=True, routed_scaling_factor=2.5),
                                  dict(recompute=False)], ids=lambda case: next(iter(case)))
def test_options_are_passed_on(case):
    recompute = case.pop("recompute", True)
    check(ranks(4), block(TOKENS, EXPERTS, **case), TOKENS, EXPERTS, recompute=recompute)


@pytest.mark.parametrize("weights", [False, True])
def test_shared_expert(weights):
    shared = make_shared(29, weights=torch.rand(sum(TOKENS)) if weights else None)
    check(ranks(4), block(TOKENS, EXPERTS, shared=shared), TOKENS, EXPERTS)


def test_adapters():
    check(ranks(4), with_adapters(block(TOKENS, EXPERTS)), TOKENS, EXPERTS)


@pytest.mark.parametrize("format", ["int8", pytest.param("mxfp4", marks=pytest.mark.full)])
def test_quantised_weights(format):
    arguments = block(TOKENS, EXPERTS, intermediate=38, dtype=BF16)
    arguments |= {name: QuantizedWeight.quantize(arguments[name], format) for name in ("w13", "w2")}
    check(ranks(4), arguments, TOKENS, EXPERTS)


def test_replicas_take_turns():
    check(ranks(4), block(TOKENS, REPLICAS), TOKENS, REPLICAS)


@pytest.mark.parametrize("chunks", [2, 5])
def test_chunks(chunks):
    """Also more than a rank has tokens."""
    check(ranks(4), block(TOKENS, EXPERTS, shared=make_shared(29)), TOKENS, EXPERTS, chunks=chunks)


@pytest.mark.parametrize("case", ["no tokens", "one rank's tokens", "one rank's experts", "one rank has all", "no experts"])
def test_extremes(case):
    tokens = {"no tokens": (0, 0, 0, 0), "one rank's tokens": (0, 0, 13, 0)}.get(case, TOKENS)
    experts = (0, 7, 0, 0) if case == "one rank has all" else EXPERTS
    arguments = block(tokens, experts)
    if case == "one rank's experts":
        arguments["topk_ids"] = torch.randint(4, 6, arguments["topk_ids"].shape, dtype=torch.int32)
    if case == "no experts":
        arguments["topk_ids"] = torch.full_like(arguments["topk_ids"], -1)
    check(ranks(4), arguments, tokens, experts)


@settings(settings.get_profile("compiling") if "compiling" in settings._profiles else settings.default)
@given(tokens=st.tuples(*[st.integers(0, 40)] * 4), experts=st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any),
       top_k=st.sampled_from([1, 3]), chunks=st.integers(1, 3), seed=st.integers(0, 2**31 - 1))
def test_any_spread(tokens, experts, top_k, chunks, seed):
    check(ranks(4), block(tokens, experts, seed, top_k=top_k), tokens, experts, chunks=chunks)
