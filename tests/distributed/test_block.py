"""expert_parallel_moe on several ranks is the block of one process, and so are its gradients."""
from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from moe_xe import QuantizedWeight
from moe_xe.distributed import expert_parallel_moe
from moe_xe.distributed.message import RowFormat
from tests.distributed.case import block, check, expected, joined, of_rank, on_rank
from tests.distributed.processes import ranks
from tests.ops.block.case import GRADIENT_LIMITS, assert_close, make_shared
from tests.ops.lora.test_lora_moe import with_adapters

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOKENS, EXPERTS = (9, 0, 17, 5), (3, 1, 2, 1)
REPLICAS = [[0, 3, 1], [2, 0], [], [0, 4, 2, 1]]


@pytest.mark.parametrize("dtype", [F32, *(pytest.param(dtype, marks=pytest.mark.full) for dtype in (BF16, F16))])
def test_equals_one_process(dtype):
    """Tokens and experts are spread unevenly."""
    check(ranks(4), block(TOKENS, EXPERTS, dtype=dtype), TOKENS, EXPERTS)


@pytest.mark.parametrize("case", [dict(bias=(F32, F32), activation="swiglu_oai", interleaved=True, limit=1.5, weight_layout="ekn",
                                       weight_on_input=True, routed_scaling_factor=2.5),
                                  dict(recompute=False)], ids=lambda case: next(iter(case)))
def test_options_are_passed_on(case):
    recompute = case.pop("recompute", True)
    check(ranks(4), block(TOKENS, EXPERTS, **case), TOKENS, EXPERTS, recompute=recompute)


@pytest.mark.parametrize("weights", [pytest.param(False, marks=pytest.mark.full), True])
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
       top_k=st.sampled_from([3, 1]), chunks=st.integers(1, 3), seed=st.integers(0, 2**31 - 1))
def test_any_spread(tokens, experts, top_k, chunks, seed):
    check(ranks(4), block(tokens, experts, seed, top_k=top_k), tokens, experts, chunks=chunks)


@pytest.mark.parametrize("wire", ["int8", pytest.param("fp8_e4m3", marks=pytest.mark.full)])
def test_rows_as_codes(wire):
    """What travels is rounded, and nothing else; gradients go straight through."""
    arguments = block(TOKENS, EXPERTS)
    x = arguments["hidden_states"]
    format = RowFormat(x.shape[1], x.dtype, wire=wire)
    rounded, *_ = format.unpack(format.pack(x))
    assert not torch.equal(rounded, x)
    found = ranks(4).run(on_rank, arguments, grad := torch.randn(x.shape), TOKENS, EXPERTS, {"wire": wire})
    want = expected(arguments | {"hidden_states": rounded}, grad)
    for name, got in joined(found, EXPERTS, sum(EXPERTS)).items():
        assert_close(got, want[name], GRADIENT_LIMITS[F32], name)


def in_other_ways(rank, arguments, way):
    own = of_rank(arguments, rank, TOKENS, EXPERTS)
    if way == "mesh":
        return expert_parallel_moe(**own, group=init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))["ep"])
    if way == "inference mode":
        with torch.inference_mode():
            return expert_parallel_moe(**own, group=None).clone()
    if way == "compiled":
        return torch.compile(lambda: expert_parallel_moe(**own, group=dist.group.WORLD), backend="aot_eager")()
    with torch.autocast("cpu", dtype=BF16):
        return expert_parallel_moe(**own, group=None)


@pytest.mark.parametrize("way", ["mesh", "inference mode", "autocast", pytest.param("compiled", marks=pytest.mark.full)])
def test_other_ways(way):
    """Of calling it; compiled, with breaks of the graph."""
    arguments = block(TOKENS, EXPERTS, ids_dtype=torch.int64, weights_dtype=F16)
    out = torch.cat(ranks(4).run(in_other_ways, arguments, way))
    assert out.dtype == (BF16 if way == "autocast" else F32)
    assert_close(out, expected(arguments, None)["out"], GRADIENT_LIMITS[out.dtype])


def on_half(rank, arguments):
    """Two groups of two ranks each; both have all experts."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = of_rank(arguments, rank % 2, TOKENS[2:], EXPERTS[:2])
    return expert_parallel_moe(**own, group=groups[rank // 2])


def test_several_groups():
    arguments = block(TOKENS[2:], EXPERTS[:2])
    first, second, *others = ranks(4).run(on_half, arguments)
    assert_close(torch.cat([first, second]), expected(arguments, None)["out"], GRADIENT_LIMITS[F32])
    assert torch.equal(first, others[0]) and torch.equal(second, others[1])
