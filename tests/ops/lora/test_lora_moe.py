"""lora_moe against float64 autograd of merged weights, one expert after the other. Most tests share sizes, and so kernels."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_xe import LoraAdapter, fused_moe, lora_moe
from moe_xe.ops.calls import Calls
from moe_xe.ops.gemm import grouped_gemm as grouped_gemm_module, grouped_outer as grouped_outer_module
from moe_xe.ops.lora.training import GRADIENTS, LORA, LoraCall

from ..block.case import HIDDEN, INTERMEDIATE, TOKENS, assert_close, call_of, make, make_shared, moved, reference

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BIASES = (F32, F32)
ADAPTERS = ("lora13.a", "lora13.b", "lora2.a", "lora2.b")
# largest error of an element over its size plus the RMS of all, and the RMS of errors over that: sums, activations, their
# gradients and the low-rank rows are rounded to the type on the way, and a gradient once more at its end
LIMITS = {BF16: (1e-1, 1e-2), F16: (1.5e-2, 1.3e-3), F32: (1e-5, 1e-6)}


def adapter(experts: int, n: int, k: int, rank: int, scaling: float, dtype=F32) -> LoraAdapter:
    """Of the weights' size, so that leaving it out shows."""
    return LoraAdapter((torch.randn(experts, rank, k) / k**0.5).to(dtype), (torch.randn(experts, n, rank) / rank**0.5).to(dtype), scaling)


def with_adapters(block: dict, rank13: int | None = 8, rank2: int | None = 5, dtype: torch.dtype | None = None) -> dict:
    """The block with adapters of the given ranks; None leaves one out."""
    dtype = dtype or block["hidden_states"].dtype
    (experts, n13, hidden), (_, _, size) = logical(block, "w13").shape, logical(block, "w2").shape
    adapters = {}
    if rank13 is not None:
        adapters["lora13"] = adapter(experts, n13, hidden, rank13, 0.5, dtype)
    if rank2 is not None:
        adapters["lora2"] = adapter(experts, hidden, size, rank2, 1.3, dtype)
    return block | adapters


def logical(block: dict, name: str) -> torch.Tensor:
    return block[name].transpose(1, 2) if block.get("weight_layout") == "ekn" else block[name]


def merged(block: dict) -> dict:
    """Arguments of fused_moe, or of its reference, with the adapters in the weights."""
    block = dict(block)
    for name, weights in (("lora13", "w13"), ("lora2", "w2")):
        if (lora := block.pop(name, None)) is not None:
            delta = lora.scaling * (lora.b @ lora.a)
            block[weights] = block[weights] + (delta.transpose(1, 2) if block.get("weight_layout") == "ekn" else delta)
    return block


def leaves(block: dict, device, dtype: torch.dtype | None = None, wanted=GRADIENTS) -> tuple[dict, dict[str, torch.Tensor]]:
    """The block with leaves of autograd for its `wanted` tensors, and these by name; in `dtype`, if it is given."""
    named = {}

    def leaf(name: str, value):
        if isinstance(value, LoraAdapter):
            return LoraAdapter(leaf(f"{name}.a", value.a), leaf(f"{name}.b", value.b), value.scaling)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return moved(value, device)
        tensor = value.detach().to(device, dtype, copy=True)
        if name in wanted:
            named[name] = tensor.requires_grad_()
        return tensor

    return {name: leaf(name, value) for name, value in block.items()}, named


def expected(block: dict, grad_out: torch.Tensor, wanted=GRADIENTS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    arguments, named = leaves(block, "cpu", F64, wanted)
    out = reference(**merged(arguments))
    if out.requires_grad:
        out.backward(grad_out.double())
    return out.detach(), {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()}


def gradients(block: dict, device, grad_out: torch.Tensor, wanted=GRADIENTS, function=lora_moe, **options):
    """The result and the leaves' gradients, by name."""
    arguments, named = leaves(block, device, wanted=wanted)
    out = function(**arguments, **options)
    assert out.dtype == block["hidden_states"].dtype and out.is_contiguous()
    return out.detach(), dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out.to(device))))


def check(block: dict, device, wanted=GRADIENTS, **options) -> dict[str, torch.Tensor]:
    x = block["hidden_states"]
    grad_out = torch.randn(x.shape).to(x.dtype)
    out, got = gradients(block, device, grad_out, wanted, **options)
    want_out, want = expected(block, grad_out, wanted)
    assert_close(out, want_out, LIMITS[x.dtype])
    assert got.keys() == want.keys()
    _, named = leaves(block, device, wanted=wanted)
    for name, gradient in got.items():
        assert gradient.dtype == named[name].dtype, name
        assert_close(gradient, want[name], LIMITS[max(x.dtype, gradient.dtype, key=LIMITS.get)], name)
    return got


VARIANTS = {
    "silu": dict(),
    "ekn": dict(bias=BIASES, weight_layout="ekn"),
    "gpt-oss": dict(activation="swiglu_oai", interleaved=True, limit=0.7, bias=BIASES, weight_layout="ekn"),
    "no gate": dict(activation="relu2", gated=False),
    "scaled": dict(routed_scaling_factor=2.5, activation="gelu_tanh", bias=BIASES),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name in ("scaled", "no gate"))) for name in VARIANTS])
def test_variants(name, recompute, device):
    check(with_adapters(make(**VARIANTS[name])), device, recompute=recompute)


@pytest.mark.parametrize("rank13, rank2", [pytest.param(1, 64, marks=pytest.mark.full), (8, None), (None, 5)])
def test_ranks(rank13, rank2, device):
    check(with_adapters(make(bias=BIASES), rank13, rank2), device)


FROZEN = ("hidden_states", "topk_weights", *ADAPTERS)       # their gradients with frozen weights


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype, layout, adapters, wanted", [
    (BF16, "enk", None, FROZEN), pytest.param(BF16, "enk", None, GRADIENTS, marks=pytest.mark.full),
    pytest.param(BF16, "enk", F32, GRADIENTS, marks=pytest.mark.full), (F16, "ekn", F16, FROZEN),
    pytest.param(F16, "ekn", F16, GRADIENTS, marks=pytest.mark.full)], ids=str)
def test_types(dtype, layout, adapters, wanted, device):
    """Adapters of another type than the block's have gradients of their own type."""
    check(with_adapters(make(31, dtype=dtype, bias=(dtype, F32), weight_layout=layout), dtype=adapters), device, wanted)


@pytest.mark.full
@pytest.mark.parametrize("top_k, ids", [(1, torch.int64), (2, torch.int32), (4, torch.int32)])
def test_experts_per_token(top_k, ids, device):
    check(with_adapters(make(top_k=top_k, ids_dtype=ids)), device)


@pytest.mark.full
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 90), experts=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_sizes_at_run_time(tokens, experts, seed, device):
    """One token, none, experts without rows and with a single one."""
    torch.manual_seed(seed)
    check(with_adapters(make(tokens, experts, bias=BIASES)), device)


def test_one_expert_has_all_tokens(device):
    block = with_adapters(make(90, 5))
    block["topk_ids"].fill_(3)
    got = check(block, device)
    for name in ("w13", *ADAPTERS):
        assert (got[name][[0, 1, 2, 4]] == 0).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("on_input", [False, True], ids=["on outputs", "on input"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_expert_gives_zeros(tokens, on_input, device):
    block = with_adapters(make(tokens, bias=BIASES, weight_on_input=on_input))
    block["topk_ids"].copy_(torch.tensor([-1, 6, 2**31 - 1])[torch.randint(3, block["topk_ids"].shape)])
    for gradient in check(block, device).values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.full), 3])
def test_weights_on_the_input(top_k, device):
    check(with_adapters(make(top_k=top_k, bias=BIASES, weight_on_input=True, routed_scaling_factor=2.5)), device)


def test_experts_of_another_rank_are_left_out(device):
    """Expert parallelism: ids are global ones, of which every second is here."""
    expert_map = torch.full((12,), -1, dtype=torch.int32)
    expert_map[::2] = torch.arange(6, dtype=torch.int32)
    block = make(bias=BIASES, expert_map=expert_map)
    block["topk_ids"] = torch.randint(12, (TOKENS, 3), dtype=torch.int32)
    check(with_adapters(block), device)


def test_shared_expert(device):
    check(with_adapters(make(shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS)), routed_scaling_factor=1.5)), device)


def test_poison_in_unused_memory_stays_there(device):
    """Adapters and tokens are slices of larger tensors; tokens of dropped pairs hold NaNs."""
    block = with_adapters(make())
    block["topk_ids"][4] = -1
    arguments, named = leaves(block, device)
    with torch.no_grad():
        named["hidden_states"][4] = float("nan")

    def strided(tensor):
        whole = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), device=device)
        return torch.slice_scatter(whole, tensor, -1, 1, 1 + tensor.shape[-1])[..., 1:1 + tensor.shape[-1]]

    for name in ("lora13", "lora2"):
        lora = arguments[name]
        arguments[name] = LoraAdapter(strided(lora.a), strided(lora.b.transpose(1, 2)).transpose(1, 2), lora.scaling)
    out = lora_moe(**arguments)
    grad_out = torch.randn(TOKENS, HIDDEN)
    got = dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out.to(device))))
    want_out, want = expected(block, grad_out)
    assert_close(out.detach(), want_out, LIMITS[F32])
    for name in want:
        assert_close(got[name], want[name], LIMITS[F32], name)


# ---------------------------------------------------------------------------------------------- beside the plain block

@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=pytest.mark.full)], ids=str)
def test_zero_b_gives_the_base(dtype, device):
    block = make(dtype=dtype, bias=(dtype, F32))
    adapted = with_adapters(block)
    for name in ("lora13", "lora2"):
        adapted[name].b.zero_()
    plain = fused_moe(**{name: moved(value, device) for name, value in block.items()})
    arguments, _ = leaves(adapted, device, wanted=())
    assert_close(lora_moe(**arguments), plain.double().cpu(), LIMITS[dtype])


@pytest.mark.parametrize("layout", ["enk", "ekn"])
def test_merged_weights_give_the_same(layout, device):
    arguments, _ = leaves(with_adapters(make(weight_layout=layout, bias=BIASES)), device, wanted=())
    assert_close(lora_moe(**arguments), fused_moe(**merged(arguments)).double().cpu(), LIMITS[F32])


def test_without_adapters_it_is_fused_moe(device):
    block = make(bias=BIASES)
    grad_out = torch.randn(TOKENS, HIDDEN)
    (out, got), (plain, want) = (gradients(block, device, grad_out, function=function) for function in (lora_moe, fused_moe))
    assert torch.equal(out, plain) and all(torch.equal(got[name], want[name]) for name in want)


# ------------------------------------------------------------------------------------------------- what is not computed

@pytest.fixture
def outputs(monkeypatch):
    """Shapes of the launches: of weights' gradients and of GEMMs."""
    shapes = {"outer": [], "gemm": []}
    monkeypatch.setattr(Calls, "get", lambda calls, key: None)      # equal ones are launched from here, too
    for module, kind in ((grouped_outer_module, "outer"), (grouped_gemm_module, "gemm")):
        def record(submission, call, out, *rest, launch=module.launch, seen=shapes[kind]):
            seen.append(tuple(out.shape))
            launch(submission, call, out, *rest)
        monkeypatch.setattr(module, "launch", record)
    return shapes


A13, B13, A2, B2 = (6, 8, HIDDEN), (6, 2 * INTERMEDIATE, 8), (6, 5, INTERMEDIATE), (6, HIDDEN, 5)


@pytest.mark.few(5)
@pytest.mark.parametrize("wanted, outer", [
    (("hidden_states", "topk_weights", *ADAPTERS), [A2, B2, A13, B13]), (ADAPTERS, [A2, B2, A13, B13]),
    (("lora13.a",), [A13]), (("lora13.b",), [B13]), (("lora2.a",), [A2]), (("lora2.b",), [B2]), (("hidden_states",), []),
    (("topk_weights",), []), (("w2",), [(6, HIDDEN, INTERMEDIATE)]), (("w13",), [(6, 2 * INTERMEDIATE, HIDDEN)])], ids=str)
def test_frozen_weights_have_no_gradient(wanted, outer, outputs, device):
    check(with_adapters(make()), device, wanted)
    assert outputs["outer"] == outer


def test_gemms_of_a_step(outputs, device):
    """With z kept: forward's base GEMMs with two narrow ones each, and the same backward."""
    check(with_adapters(make()), device, ("hidden_states", *ADAPTERS), recompute=False)
    z, g, tokens, r13, r2 = ((3 * TOKENS, n) for n in (2 * INTERMEDIATE, INTERMEDIATE, HIDDEN, 8, 5))
    assert sorted(outputs["gemm"]) == sorted(
        [z, r13, z, r2, tokens, tokens] + [g, r2, g, r2, r13, tokens, tokens])    # backward also needs h times lora2.a again


def kept_bytes(block: dict, device, recompute: bool) -> int:
    """Of tensors that are kept for backward, arguments apart."""
    arguments, named = leaves(block, device)
    given = {tensor.data_ptr() for tensor in (*named.values(), arguments["topk_ids"])}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert lora_moe(**arguments, recompute=recompute).requires_grad
    return sum(kept.values())


def test_what_is_kept_for_backward(device):
    block = with_adapters(make(300))
    small = 8 * 900 + 4 * 6
    assert kept_bytes(block, device, recompute=True) == small
    assert kept_bytes(block, device, recompute=False) == small + 900 * (2 * INTERMEDIATE + 8) * 4


# ------------------------------------------------------------------------------------------------------- autograd, torch

# sums over the rows of so many tokens are split
@pytest.mark.full
@pytest.mark.parametrize("tokens, dtype", [(300, F32), pytest.param(80, BF16, marks=pytest.mark.full), pytest.param(300, BF16, marks=pytest.mark.full)], ids=str)
def test_two_runs_are_bitwise_equal(tokens, dtype, device):
    block = with_adapters(make(tokens, dtype=dtype, bias=(dtype, F32)))
    grad_out = torch.randn(tokens, HIDDEN).to(dtype)
    (out, first), (out_again, again) = (gradients(block, device, grad_out) for _ in range(2))
    assert torch.equal(out, out_again) and all(torch.equal(first[name], again[name]) for name in first)


def test_under_autocast(device):
    block = with_adapters(make(bias=BIASES))
    arguments, named = leaves(block, device)
    grad_out = torch.randn(TOKENS, HIDDEN).to(BF16)
    with torch.autocast(device.type, BF16):
        out = lora_moe(**arguments)
    assert out.dtype == BF16
    out.backward(grad_out.to(device))
    want_out, want = expected(block, grad_out)
    assert_close(out.detach(), want_out, LIMITS[BF16])
    for name, leaf in named.items():
        assert leaf.grad.dtype == F32
        assert_close(leaf.grad, want[name], LIMITS[BF16], name)


@pytest.mark.parametrize("on_input", [False, True], ids=["on outputs", "on input"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
def test_compiles(on_input, recompute, device):
    block = with_adapters(make(bias=BIASES, weight_on_input=on_input))
    grad_out = torch.randn(TOKENS, HIDDEN)
    compiled = torch.compile(lora_moe, fullgraph=True, backend="aot_eager")
    (out, got), (plain, want) = (gradients(block, device, grad_out, function=function, recompute=recompute)
                                 for function in (compiled, lora_moe))
    assert torch.equal(out, plain) and all(torch.equal(got[name], want[name]) for name in want)


def op_arguments(block: dict, device, recompute: bool) -> tuple:
    arguments, _ = leaves(block, device)
    adapters = {name: arguments.pop(name) for name in ("lora13", "lora2") if name in arguments}
    return (*LORA.flatten(LoraCall(**vars(call_of(arguments)), **adapters)), recompute)


@pytest.mark.few(3)
@pytest.mark.parametrize("tokens, rank13, rank2, recompute", [(9, 8, 5, True), (9, 8, 5, False), (0, 8, 5, False), (9, None, 5, False),
                                                              (9, 8, None, True)])
def test_opcheck(tokens, rank13, rank2, recompute, device):
    block = make(tokens, bias=BIASES)
    block["topk_ids"] %= 6      # as rows of z that no pair has hold anything
    arguments = op_arguments(with_adapters(block, rank13, rank2), device, recompute)
    torch.library.opcheck(torch.ops.moe_xe.lora_moe, arguments)


def test_opcheck_of_backward(device):
    arguments = op_arguments(with_adapters(make(9, bias=BIASES, weight_layout="enk")), device, recompute=False)
    arguments = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)
    out, *saved = torch.ops.moe_xe.lora_moe(*arguments)
    for needed in ([True] * 10, [False, True] * 5):
        torch.library.opcheck(torch.ops.moe_xe.lora_moe_backward, (torch.randn_like(out), *arguments[:-1], *saved, needed))


def test_second_derivatives_are_refused(device):
    arguments, named = leaves(with_adapters(make()), device)
    gradient, = torch.autograd.grad(lora_moe(**arguments).square().sum(), named["lora13.a"], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_moe has no second derivatives"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("name, change, error, match", [
    ("lora13", lambda lora: (lora.a, lora.b), TypeError, "lora13 must be a LoraAdapter, got tuple"),
    ("lora13", lambda lora: replace(lora, a=None), TypeError, "lora13.a must be a torch.Tensor"),
    ("lora2", lambda lora: replace(lora, a=lora.a[0]), ValueError, "lora2.a must have 3 dimensions"),
    ("lora2", lambda lora: replace(lora, a=lora.a[:, :0]), ValueError, "lora2.a must have a rank of at least 1"),
    ("lora13", lambda lora: replace(lora, a=lora.a[:-1]), ValueError, r"lora13.a must be \[6, 8, 50\]"),
    ("lora13", lambda lora: replace(lora, b=lora.b.transpose(1, 2)), ValueError, r"lora13.b must be \[6, 74, 8\]"),
    ("lora13", lambda lora: replace(lora, b=lora.b.double()), TypeError, "lora13.b must be .*float64"),
    ("lora2", lambda lora: replace(lora, b=lora.b.to("meta")), ValueError, "all tensors must be on one device"),
    ("lora2", lambda lora: replace(lora, scaling="2"), TypeError, "lora2.scaling must be a number"),
    ("lora2", lambda lora: replace(lora, scaling=float("inf")), ValueError, "lora2.scaling must be finite"),
])
def test_bad_adapters(name, change, error, match):
    block = with_adapters(make())
    with pytest.raises(error, match=match):
        lora_moe(**block | {name: change(block[name])})
