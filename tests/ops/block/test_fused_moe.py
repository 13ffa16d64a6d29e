"""fused_moe against one expert after the other in float64. Most tests share sizes, and so kernels."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe import Fusions, fused_moe_workspace_bytes
from moe_xe.plan.gemm.config import GenericConfig, Schedule
from moe_xe.plan.override import force_config

from ..threads import assert_threads_agree
from .case import HIDDEN, INTERMEDIATE, TOKENS, assert_right, check, make, make_shared, moved, reference, run

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = ["enk", "ekn"]
ALL_OFF = Fusions(gather=False, activation=False, scatter=False, shared=False)
BIASES = (F32, F32)


# an activation is the same code in both layouts, what pairs are is not; that of gpt-oss is in test_one_launch.py, too
ACTIVATIONS = {
    "gelu": dict(activation="gelu"),
    "gelu_tanh": dict(activation="gelu_tanh", weight_layout="ekn", bias=BIASES),
    "silu, limit": dict(activation="silu", weight_layout="ekn", limit=0.5),
    "silu, interleaved": dict(activation="silu", weight_layout="ekn", interleaved=True),
    "silu, no gate": dict(activation="silu", weight_layout="ekn", gated=False),
    "relu2, no gate": dict(activation="relu2", gated=False, bias=BIASES),
    "swiglu_oai": dict(activation="swiglu_oai", weight_layout="ekn", alpha=1.3),
    "swiglu_oai of gpt-oss": dict(activation="swiglu_oai", interleaved=True, limit=0.7, bias=BIASES),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, device):
    check(make(31, **ACTIVATIONS[name]), device)


@pytest.mark.few(1)        # test_y_dtype.py has float16, test_one_launch.py bfloat16 in the other layout
@pytest.mark.parametrize("dtype, bias, weights, layout", [
    (BF16, (BF16, F32), F32, "enk"), (BF16, (F32, BF16), BF16, "ekn"), (F16, (F16, F32), F16, "enk"), (F16, None, F16, "ekn"),
    (F32, (BF16, F16), F32, "ekn")], ids=str)
def test_types(dtype, bias, weights, layout, device):
    check(make(31, dtype=dtype, bias=bias, weight_layout=layout, weights_dtype=weights), device)


@pytest.mark.full       # others have one, three and ten
@pytest.mark.parametrize("top_k, weights, ids", [(1, BF16, torch.int64), (2, F16, torch.int32), (8, F32, torch.int64), (10, BF16, torch.int32)])
def test_experts_per_token(top_k, weights, ids, device):
    check(make(top_k=top_k, experts=12, weights_dtype=weights, ids_dtype=ids, weight_layout="ekn"), device)


@pytest.mark.few(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens, experts", [(1, 6), (3, 1), (31, 64), (250, 3), (90, 512)])
def test_sizes_at_run_time(tokens, experts, layout, device):
    check(make(tokens, experts, weight_layout=layout), device)


def test_one_expert_has_all_tokens(device):
    block = make(400, 5)
    block["topk_ids"].fill_(3)      # three times within each token, too
    check(block, device)


def test_an_expert_has_more_rows_than_there_are_tokens(device):
    """Its kernel is for few rows, since tokens seldom choose an expert twice."""
    block = make(experts=3, top_k=4)
    block["topk_ids"].fill_(1)
    check(block, device)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_expert_gives_zeros(tokens, top_k, device):
    block = make(tokens, top_k=top_k)
    block["topk_ids"].copy_(torch.tensor([-1, 6, 2**31 - 1])[torch.randint(3, block["topk_ids"].shape)])
    out = torch.full((tokens, HIDDEN), float("nan"), device=device)
    run(block, device, out=out)
    assert (out == 0).all()


def test_a_new_result(device):
    block = make(dtype=BF16, bias=(BF16, F32))
    out = run(block, device)
    assert out.dtype == BF16 and out.is_contiguous() and out.device.type == device.type
    assert_right(out, reference(**block))


def test_weights_as_transposed_views(device):
    """The layout in memory counts, not the view: the kernels are those of the other layout."""
    for layout in LAYOUTS:
        block = make(weight_layout=layout, bias=BIASES)
        expected = reference(**block)
        other = {"enk": "ekn", "ekn": "enk"}[layout]
        views = dict(w13=block["w13"].transpose(1, 2), w2=block["w2"].transpose(1, 2), weight_layout=other)
        assert_right(run(block | views, device), expected)


def within(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The same values as a slice of a larger tensor of poison."""
    *leading, height, width = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else 0
    whole = torch.full((*leading, height + rows, width + columns), poison, dtype=tensor.dtype)
    return whole[..., :height, 1:1 + width].copy_(tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_operands_are_used_in_place(layout, device):
    block = make(weight_layout=layout, bias=BIASES)
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "b13", "b2")
    slices = {name: within(block[name].to(device), 2, 5) for name in names} if device.type == "cpu" else {}
    whole = torch.full((TOKENS + 2, HIDDEN + 9), 7.0, device=device)
    run(block | slices, device, out=whole[1:-1, 4:-5])
    assert_right(whole[1:-1, 4:-5], reference(**block))
    assert (whole[[0, -1]] == 7).all() and (whole[:, :4] == 7).all() and (whole[:, -5:] == 7).all()


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("on_input", [False, True], ids=["on outputs", "on input"])
def test_weights_and_their_factor(on_input, top_k, device):
    check(make(top_k=top_k, bias=BIASES, weight_on_input=on_input, routed_scaling_factor=2.5), device)


@pytest.mark.few(1)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_two_ranks_add_up_to_all_experts(ids_dtype, device):
    """Each has every second expert; ids are global ones."""
    block = make(experts=8, ids_dtype=ids_dtype)
    expected, total = reference(**block), torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for rank in range(2):
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[rank::2] = torch.arange(4, dtype=torch.int32)
        part = block | dict(w13=block["w13"][rank::2], w2=block["w2"][rank::2], expert_map=expert_map)
        total += check(part, device).double().cpu()
    assert_right(total.float(), expected)


SHARED = {
    "of the experts' size": (dict(), INTERMEDIATE),
    "of two sizes": (dict(), 2 * INTERMEDIATE),
    "of two sizes, no gate": (dict(activation="relu2", gated=False), 2 * INTERMEDIATE),
    "apart: another size": (dict(), INTERMEDIATE + 4),
    "apart: ekn": (dict(weight_layout="ekn"), INTERMEDIATE),
    "apart: interleaved": (dict(activation="swiglu_oai", interleaved=True, limit=0.7), INTERMEDIATE),
    "apart, one slot": (dict(top_k=1, weight_layout="ekn"), INTERMEDIATE),
}


# tests below have those apart, and without weights of their own
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "of two sizes")) for name in SHARED])
@pytest.mark.parametrize("weights", [torch.rand(TOKENS, 1).to(BF16), pytest.param(torch.rand(TOKENS), marks=pytest.mark.full), pytest.param(None, marks=pytest.mark.full)],
                         ids=["bf16 column", "weights", ""])
def test_shared_expert(weights, name, device):
    """With biases of the routed experts, which the shared one does not get; with and without weights of its own."""
    options, size = SHARED[name]
    check(make(bias=BIASES, shared=make_shared(size, options.get("gated", True), weights), routed_scaling_factor=1.5, **options), device)


@pytest.mark.few(1)
@pytest.mark.parametrize("weights", [None, torch.rand(TOKENS)], ids=["merged", "apart"])
def test_shared_expert_with_weights_on_the_input(weights, device):
    """The shared expert's own weights scale its output all the same."""
    check(make(bias=BIASES, shared=make_shared(INTERMEDIATE, weights=weights), weight_on_input=True), device)


def test_shared_experts_projections_of_different_pitch(device):
    shared = make_shared(INTERMEDIATE, weights=torch.rand(TOKENS, 2)[:, 1])
    block = make(bias=BIASES, shared=shared)
    expected = reference(**block)
    block["shared"] = replace(shared, gate_proj=within(shared.gate_proj, 0, 3)) if device.type == "cpu" else shared
    assert_right(run(block, device), expected)


def test_shared_expert_without_routed_ones(device):
    block = make(bias=BIASES, shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS)))
    block["topk_ids"].fill_(-1)
    check(block, device)


FUSIONS = {"gather": Fusions(gather=False), "activation": Fusions(activation=False), "scatter": Fusions(scatter=False),
           "shared": Fusions(shared=False), "all": ALL_OFF}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name == "all")) for name in FUSIONS])
@pytest.mark.parametrize("top_k, on_input", [(3, False), (1, False), (3, True)])
def test_without_a_fusion(name, top_k, on_input, device):
    block = make(top_k=top_k, bias=BIASES, weight_on_input=on_input)
    if top_k == 3:
        block["shared"] = make_shared(INTERMEDIATE, weights=None if on_input else torch.rand(TOKENS))
    expected = reference(**block)
    assert_right(run(block, device), expected)
    assert_right(run(block, device, FUSIONS[name]), expected)


@pytest.mark.parametrize("options", [dict(dtype=BF16, weight_layout="ekn", interleaved=True),
                                     pytest.param(dict(activation="relu2", gated=False), marks=pytest.mark.full)],
                         ids=["bf16 ekn interleaved", "relu2"])
def test_without_any_fusion(options, device):
    check(make(**options), device, fusions=ALL_OFF)


def workspace_of(block: dict, device) -> torch.Tensor:
    """The size that is asked for, of bytes that are NaN in every type."""
    x, shared = block["hidden_states"], block.get("shared")
    size = fused_moe_workspace_bytes(x.shape[0], block["topk_ids"].shape[1], HIDDEN, INTERMEDIATE, block["w13"].shape[0], dtype=x.dtype,
                                     shared_intermediate_size=0 if shared is None else shared.up_proj.shape[0])
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


@pytest.mark.few(2)
@pytest.mark.parametrize("options, shared_size", [(dict(), 0), (dict(top_k=1), 0), (dict(bias=BIASES), INTERMEDIATE), (dict(bias=BIASES), INTERMEDIATE + 4),
                                                  (dict(weight_layout="ekn", bias=BIASES), INTERMEDIATE)])
def test_workspace(options, shared_size, device):
    """Exactly the bytes that are asked for are enough, wherever they begin, whatever they hold."""
    for tokens in (0, 1, 31, 77):
        block = make(tokens, **options)
        if shared_size:
            block["shared"] = make_shared(shared_size)
        workspace = workspace_of(block, device)
        check(block, device, workspace=workspace)
        odd = torch.full((len(workspace) + 3,), 0xFF, dtype=torch.uint8, device=device)[3:]
        assert_right(run(block, device, workspace=odd), reference(**block))
        with pytest.raises(ValueError, match=f"workspace must have at least {len(workspace)} bytes .*, got {len(workspace) - 1}"):
            run(block, device, workspace=workspace[:-1])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "activation")) for name in FUSIONS])
@pytest.mark.parametrize("top_k", [1, pytest.param(3, marks=pytest.mark.full)])
def test_workspace_without_a_fusion(name, top_k, device):
    block = make(top_k=top_k, bias=BIASES)
    assert_right(run(block, device, FUSIONS[name], workspace=workspace_of(block, device)), reference(**block))


def allocations(call) -> list[int]:
    """Bytes of every allocation of torch's on the way."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return [event.self_cpu_memory_usage + event.self_device_memory_usage for event in profile.events()
            if event.self_cpu_memory_usage + event.self_device_memory_usage > 0]


@pytest.mark.cpu_device     # the simulated card's memory is not torch's profiler's
def test_nothing_else_is_allocated(device):
    """No [rows, 2I], no tokens in sorted order: activations and the results of pairs, beside the kernels' scratch."""
    tokens, top_k = 300, 3
    block = {name: moved(value, device) for name, value in make(tokens, dtype=BF16, bias=(BF16, F32)).items()}
    workspace = workspace_of(block, device)
    pairs = tokens * top_k
    assert len(workspace) < pairs * (2 * INTERMEDIATE + 4 * HIDDEN + 4 + 4) + 4096
    out = torch.empty(tokens, HIDDEN, dtype=BF16, device=device)
    run(block, device, out=out, workspace=workspace)
    scratch = allocations(lambda: run(block, device, out=out, workspace=workspace))
    assert len(scratch) == (1 if device.type == "cpu" else 0)
    taken = allocations(lambda: run(block, device, out=out))
    assert sum(taken) - sum(scratch) <= len(workspace)


def test_two_runs_are_bitwise_equal(device):
    for options in (dict(), dict(top_k=1, bias=BIASES), dict(dtype=BF16, bias=(BF16, F32))):
        block = make(300, **options)
        assert torch.equal(run(block, device), run(block, device))


@pytest.mark.parametrize("top_k", [1, 3])
def test_inf_and_nan_stay_in_their_token(top_k, device):
    block = make(top_k=top_k, bias=BIASES)
    block["topk_ids"] = torch.randint(0, 6, (TOKENS, top_k), dtype=torch.int32)
    clean = run(block, device)
    block["hidden_states"][2, 3], block["hidden_states"][5, 0] = float("nan"), float("inf")
    out = run(block, device)
    others = [token for token in range(TOKENS) if token not in (2, 5)]
    assert out[2].isnan().all() and not out[5].isfinite().any()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("layout, top_k", [("enk", 3), *(pytest.param(*point, marks=pytest.mark.full) for point in (("enk", 1), ("ekn", 1), ("ekn", 3)))])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 120), experts=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_number_of_tokens_and_experts(device, layout, top_k, tokens, experts, seed):
    torch.manual_seed(seed)
    check(make(tokens, experts, top_k, weight_layout=layout), device)


@pytest.mark.full       # each size compiles a whole block
@settings(settings.get_profile("compiling"), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=st.integers(1, 130), intermediate=st.integers(1, 130), layout=st.sampled_from(LAYOUTS), gated=st.booleans(),
       dtype=st.sampled_from([BF16, F16, F32]))
def test_any_size(device, hidden, intermediate, layout, gated, dtype):
    check(make(40, 4, 3, hidden, intermediate, dtype, gated=gated, weight_layout=layout), device)


def test_several_threads(device):
    blocks = [make(20 * (1 + index), 3 + index) for index in range(4)]
    expected = [run(block, device) for block in blocks]
    assert_threads_agree(lambda block: run(block, device), blocks, expected, 10)


@pytest.mark.parametrize("options", [
    dict(shared=2 * INTERMEDIATE, bias=BIASES), pytest.param(dict(weight_layout="ekn", **ACTIVATIONS["swiglu_oai of gpt-oss"]), marks=pytest.mark.full)],
    ids=["merged", "gpt-oss"])
def test_the_generic_kernel_on_the_cpu_device(options):
    """The path of any other GPU, forced: small blocks, which the CPU device's compiler takes long over. The GPUs' own
    functions for reciprocals and powers are coarse there."""
    config = GenericConfig(heights=(8,), tile_width=32, raster_group=2, min_fill_eighths=8, schedule=Schedule.dynamic,
                           sub_group_rows=(4,), sub_group_columns=(32,))
    block = make(dtype=F16, **options)
    if "shared" in options:
        block["shared"] = make_shared(options["shared"], weights=torch.rand(TOKENS), dtype=F16)
    with force_config(config):
        check(block, torch.device("cpu"))
