"""Gradients of fused_moe against float64 autograd of one expert after the other. Most tests share sizes, and so kernels."""
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_xe import SharedExpert, fused_moe
from moe_xe.ops.block import fused_moe as fused_moe_module
from moe_xe.ops.block.call import BLOCK
from moe_xe.ops.calls import Calls
from moe_xe.ops.gemm import grouped_gemm as grouped_gemm_module, grouped_outer as grouped_outer_module

from .case import GRADIENT_LIMITS as LIMITS, HIDDEN, INTERMEDIATE, TOKENS, assert_close, call_of, make, make_shared, moved, random_ids, reference
from .test_fused_moe import within

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAYOUTS = ["enk", "ekn"]
BIASES = (F32, F32)


def leaves(block: dict, device, dtype: torch.dtype | None = None, frozen=()) -> tuple[dict, dict[str, torch.Tensor]]:
    """The block with leaves of autograd for its floating tensors, and these by name; in `dtype`, if it is given."""
    named = {}

    def leaf(name: str, value):
        if isinstance(value, SharedExpert):
            return SharedExpert(**{key: leaf(f"shared.{key}", tensor) for key, tensor in vars(value).items()})
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return moved(value, device)
        tensor = value.detach().to(device, dtype, copy=dtype is not None)
        if name not in frozen:
            named[name] = tensor = tensor.detach().requires_grad_()
        return tensor

    return {name: leaf(name, value) for name, value in block.items()}, named


def expected(block: dict, grad_out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The result and the gradients, in float64."""
    arguments, named = leaves(block, "cpu", F64)
    out = reference(**arguments)
    if not out.requires_grad:
        return out, {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    out.backward(grad_out.double().cpu())
    return out.detach(), {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()}


def sizes_of_few(block: dict, grad_out: torch.Tensor, want: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the few gradients of one or two tokens' weights, each a sum over all columns: with other signs it cancels less or more."""
    if not 0 < want.get("topk_weights", torch.empty(0)).numel() < 64:
        return {}
    others = [expected(block, grad_out * torch.randint(0, 2, grad_out.shape).mul(2).sub(1))[1]["topk_weights"] for _ in range(9)]
    return {"topk_weights": torch.stack(others).square().mean(0).sqrt()}


def assert_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], dtype: torch.dtype,
                     sizes: dict[str, torch.Tensor] = {}) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], LIMITS[dtype], name, sizes.get(name))


def gradients(block: dict, device, grad_out: torch.Tensor, frozen=(), **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The result and the leaves' gradients, as they come from the op (.grad would be in its leaf's layout anyway)."""
    arguments, named = leaves(block, device, frozen=frozen)
    out = fused_moe(**arguments, **options)
    assert out.dtype == block["hidden_states"].dtype and out.is_contiguous()
    return out.detach(), dict(zip(named, torch.autograd.grad(out, list(named.values()), grad_out.to(device))))


def check(block: dict, device, **options) -> dict[str, torch.Tensor]:
    x = block["hidden_states"]
    grad_out = torch.randn(x.shape).to(x.dtype)
    out, got = gradients(block, device, grad_out, **options)
    want_out, want = expected(block, grad_out)
    assert_close(out, want_out, LIMITS[x.dtype])
    assert_gradients(got, want, x.dtype, sizes_of_few(block, grad_out, want))
    _, named = leaves(block, device)
    for name, gradient in got.items():
        assert (gradient.shape, gradient.dtype) == (named[name].shape, named[name].dtype), name
    return got


ACTIVATIONS = {
    "silu": dict(),
    "silu, interleaved, limit": dict(interleaved=True, limit=0.5),
    "silu, no gate": dict(gated=False, bias=BIASES),
    "gelu": dict(activation="gelu", limit=0.7),
    "gelu, interleaved": dict(activation="gelu", interleaved=True),
    "gelu_tanh": dict(activation="gelu_tanh"),
    "relu2": dict(activation="relu2"),
    "relu2, no gate, limit": dict(activation="relu2", gated=False, limit=0.6),
    "swiglu_oai": dict(activation="swiglu_oai", alpha=1.3),
    "swiglu_oai of gpt-oss": dict(activation="swiglu_oai", interleaved=True, limit=0.7, bias=BIASES),
}


@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=pytest.mark.full)], ids=["recompute", "keep z"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name != "swiglu_oai of gpt-oss")) for name in ACTIVATIONS])
def test_activations(name, recompute, device):
    check(make(31, **ACTIVATIONS[name]), device, recompute=recompute)


BF16_ENK = dict(dtype=BF16, bias=(BF16, F32), weights_dtype=F32)
BF16_EKN = dict(dtype=BF16, bias=(F32, F16), weights_dtype=BF16, weight_layout="ekn")
F16_EKN = dict(dtype=F16, bias=(F32, F16), weights_dtype=F16, weight_layout="ekn")
F32_ENK = dict(dtype=F32, bias=(BF16, F16), weights_dtype=BF16)


@pytest.mark.few(1)
@pytest.mark.parametrize("types", [BF16_ENK, BF16_EKN, F16_EKN, F32_ENK], ids=["bf16 enk", "bf16 ekn", "f16 ekn", "f32 enk"])
def test_types(types, device):
    """Types of the biases and of the experts' weights are their own; a gradient has its argument's."""
    block, dtype = make(31, **types), types["dtype"]
    grad_out = torch.randn(31, HIDDEN).to(dtype)
    out, got = gradients(block, device, grad_out)
    _, want = expected(block, grad_out)
    for name in want:       # of which some are rounded to a coarser type than the block's
        coarsest = max(dtype, got[name].dtype, key=LIMITS.get)
        assert_close(got[name], want[name], LIMITS[coarsest], name)
        assert got[name].dtype == block[name].dtype


@pytest.mark.parametrize("top_k, ids", [(1, torch.int64), pytest.param(8, torch.int32, marks=pytest.mark.full)])
def test_experts_per_token(top_k, ids, device):
    check(make(top_k=top_k, experts=12, ids_dtype=ids, bias=BIASES), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_lie_as_the_weights_do(layout, device):
    """Also where the weights are a transposed view of what lies in memory."""
    block = make(weight_layout=layout, bias=BIASES)
    other = {"enk": "ekn", "ekn": "enk"}[layout]
    views = dict(w13=block["w13"].transpose(1, 2), w2=block["w2"].transpose(1, 2), weight_layout=other)
    for variant in (block, block | views):
        got = check(variant, device)
        for name in ("w13", "w2"):
            assert got[name].stride() == variant[name].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arguments(layout, device):
    block = make(weight_layout=layout, bias=BIASES)
    names = ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "b13", "b2")
    check(block | {name: within(block[name], 2, 5) for name in names}, device)


@pytest.mark.few(2)
@pytest.mark.parametrize("tokens, experts", [(1, 6), (3, 1), (7, 40), (250, 3)])
def test_sizes_at_run_time(tokens, experts, device):
    """Experts without rows and with a single one; some with many."""
    check(make(tokens, experts, bias=BIASES), device)


def test_one_expert_has_all_tokens(device):
    block = make(90, 5, bias=BIASES)
    block["topk_ids"].fill_(3)      # three times within each token, too
    got = check(block, device)
    for name in ("w13", "w2", "b13", "b2"):
        assert (got[name][[0, 1, 2, 4]] == 0).all()


@pytest.mark.parametrize("on_input", [False, True], ids=["on outputs", "on input"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_no_expert_gives_zeros(tokens, on_input, device):
    block = make(tokens, bias=BIASES, weight_on_input=on_input)
    block["topk_ids"].copy_(torch.tensor([-1, 6, 2**31 - 1])[torch.randint(3, block["topk_ids"].shape)])
    for gradient in check(block, device).values():
        assert (gradient == 0).all()


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.full), 3])
@pytest.mark.parametrize("bias", [pytest.param(None, marks=pytest.mark.full), BIASES], ids=["", "bias"])
def test_weights_on_the_input(bias, top_k, recompute, device):
    check(make(top_k=top_k, bias=bias, weight_on_input=True, routed_scaling_factor=2.5), device, recompute=recompute)


@pytest.mark.full
def test_weights_on_the_input_in_bfloat16(device):
    check(make(**BF16_ENK, weight_on_input=True), device)


def test_routed_scaling_factor(device):
    check(make(bias=BIASES, routed_scaling_factor=2.5), device)


@pytest.mark.parametrize("on_input", [False, True], ids=["on outputs", "on input"])
def test_two_ranks_add_up_to_all_experts(on_input, device):
    """Each has every second expert; ids are global ones."""
    block = make(experts=8, bias=BIASES, weight_on_input=on_input)
    grad_out = torch.randn(TOKENS, HIDDEN)
    _, want = expected(block, grad_out)
    total = {name: torch.zeros(TOKENS, columns) for name, columns in (("hidden_states", HIDDEN), ("topk_weights", 3))}
    for rank in range(2):
        mine = {name: block[name][rank::2] for name in ("w13", "w2", "b13", "b2")}
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[rank::2] = torch.arange(4, dtype=torch.int32)
        _, got = gradients(block | mine | dict(expert_map=expert_map), device, grad_out)
        assert_gradients({name: got[name] for name in mine}, {name: want[name][rank::2] for name in mine}, F32)
        for name in total:
            total[name] += got[name].cpu()
    assert_gradients(total, {name: want[name] for name in total}, F32)


SHARED = {
    "of the experts' size": (dict(), INTERMEDIATE),
    "of another size": (dict(), INTERMEDIATE + 4),
    "no gate": (dict(activation="relu2", gated=False), INTERMEDIATE),
    "interleaved routed experts": (dict(activation="swiglu_oai", interleaved=True, limit=0.7, bias=BIASES), INTERMEDIATE),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SHARED)
def test_shared_expert(name, device):
    options, size = SHARED[name]
    for weights in (None, torch.rand(TOKENS), torch.rand(TOKENS, 1)):
        check(make(shared=make_shared(size, options.get("gated", True), weights), routed_scaling_factor=1.5, **options), device)


def test_shared_expert_in_bfloat16(device):
    check(make(**BF16_ENK, shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS), dtype=BF16)), device)


@pytest.mark.parametrize("options", [pytest.param(dict(), marks=pytest.mark.full), BF16_ENK, dict(activation="relu2", gated=False)], ids=["f32", "bf16", "relu2"])
def test_recomputing_agrees_with_keeping(options, device):
    block = make(**options)
    dtype = block["hidden_states"].dtype
    grad_out = torch.randn(TOKENS, HIDDEN).to(dtype)
    (out, computed), (kept_out, kept) = (gradients(block, device, grad_out, recompute=recompute) for recompute in (True, False))
    assert_close(out, kept_out, LIMITS[dtype])          # h is from sums, or from the rounded z
    for name, gradient in computed.items():     # both from the same z
        assert torch.equal(gradient, kept[name]), name


# ------------------------------------------------------------------------------------------------- what is not computed

@pytest.fixture
def outputs(monkeypatch):
    """Shapes of the gradients' launches: of weights' gradients and of GEMMs."""
    shapes = {"outer": [], "gemm": []}
    monkeypatch.setattr(Calls, "get", lambda calls, key: None)      # equal ones are launched from here, too
    for module, kind in ((grouped_outer_module, "outer"), (grouped_gemm_module, "gemm")):
        def record(submission, call, out, *rest, launch=module.launch, seen=shapes[kind]):
            seen.append(tuple(out.shape))
            launch(submission, call, out, *rest)
        monkeypatch.setattr(module, "launch", record)
    return shapes


ROUTED = ("hidden_states", "w13", "w2", "topk_weights", "b13", "b2")
W13, W2, B13, B2 = (6, 2 * INTERMEDIATE, HIDDEN), (6, HIDDEN, INTERMEDIATE), (6, 1, 2 * INTERMEDIATE), (6, 1, HIDDEN)
G, DX = (3 * TOKENS, INTERMEDIATE), (3 * TOKENS, HIDDEN)


@pytest.mark.parametrize("wanted, outer, gemms", [
    (("hidden_states", "topk_weights"), [], [G, DX]), (("w2",), [W2], [G]), (("w13", "b13"), [W13, B13], [G]), (("b2",), [B2], []),
    (("topk_weights",), [], [G]), (ROUTED, [W2, W13, B13, B2], [G, DX])], ids=str)
def test_only_what_is_wanted_is_computed(wanted, outer, gemms, outputs, device):
    block = make(bias=BIASES)
    grad_out = torch.randn(TOKENS, HIDDEN)
    _, got = gradients(block, device, grad_out, frozen=set(ROUTED) - set(wanted), recompute=False)
    assert outputs == {"outer": outer, "gemm": gemms}
    _, want = expected(block, grad_out)
    assert_gradients(got, {name: want[name] for name in wanted}, F32)


@pytest.mark.parametrize("wanted", [pytest.param(name, marks=[pytest.mark.full] * name.startswith(("w13", "b"))) for name in ROUTED])
def test_one_gradient_with_weights_on_the_input(wanted, device):
    block = make(bias=BIASES, weight_on_input=True)
    grad_out = torch.randn(TOKENS, HIDDEN)
    _, got = gradients(block, device, grad_out, frozen=set(ROUTED) - {wanted})
    _, want = expected(block, grad_out)
    assert_gradients(got, {wanted: want[wanted]}, F32)


def test_only_the_shared_expert_learns(outputs, device):
    block = make(shared=make_shared(INTERMEDIATE))
    grad_out = torch.randn(TOKENS, HIDDEN)
    _, got = gradients(block, device, grad_out, frozen=ROUTED)
    _, want = expected(block, grad_out)
    assert_gradients(got, {name: want[name] for name in got}, F32)
    assert got.keys() == {"shared.gate_proj", "shared.up_proj", "shared.down_proj"} and outputs == {"outer": [], "gemm": []}


def test_inference_takes_the_op_of_inference(monkeypatch, device):
    arguments, _ = leaves(make(), device)

    def refuse(*_):
        raise AssertionError("the op of training")

    monkeypatch.setattr(fused_moe_module, "differentiable_moe", refuse)
    plain = fused_moe(**{name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = fused_moe(**arguments)
        assert not out.requires_grad and torch.equal(out, plain)
    with pytest.raises(AssertionError, match="the op of training"):
        fused_moe(**arguments)


@pytest.mark.parametrize("name", ["out", "workspace"])
def test_out_and_workspace_are_for_inference(name, device):
    arguments, _ = leaves(make(), device)
    tensor = torch.empty(TOKENS, HIDDEN, device=device) if name == "out" else torch.empty(2**20, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="out and workspace are for inference"):
        fused_moe(**arguments, **{name: tensor})
    with torch.no_grad():
        fused_moe(**arguments, **{name: tensor})


def test_second_derivatives_are_refused(device):
    arguments, named = leaves(make(), device)
    x_gradient, = torch.autograd.grad(fused_moe(**arguments).square().sum(), named["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="fused_moe has no second derivatives"):
        x_gradient.sum().backward()


def kept_bytes(block: dict, device, recompute: bool) -> int:
    """Of tensors that are kept for backward, arguments apart."""
    arguments, _ = leaves(block, device)
    given = {value.data_ptr() for value in arguments.values() if isinstance(value, torch.Tensor)}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = fused_moe(**arguments, recompute=recompute)
    assert out.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_backward(device):
    """With recompute: nothing as large as the rows' activations. Each row's pair and factor, each expert's rows."""
    block = make(300, **BF16_ENK)
    rows = block["topk_ids"].numel()
    small = 8 * rows + 4 * 6
    assert kept_bytes(block, device, recompute=True) == small
    assert kept_bytes(block, device, recompute=False) == small + rows * 2 * INTERMEDIATE * 2


# ------------------------------------------------------------------------------------------------------- autograd, torch

@pytest.mark.parametrize("options", [dict(bias=BIASES), pytest.param(BF16_ENK, marks=pytest.mark.full)], ids=["f32", "bf16"])
def test_two_runs_are_bitwise_equal(options, device):
    block = make(250, 3, **options)     # of so many rows that their sums are split
    grad_out = torch.randn(250, HIDDEN).to(block["hidden_states"].dtype)
    (out, first), (out_again, again) = (gradients(block, device, grad_out) for _ in range(2))
    assert torch.equal(out, out_again)
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_any_strides_of_the_gradient(device):
    """sum's is one number, expanded; a transposed result's, transposed."""
    block = make()
    diagonal = torch.eye(TOKENS, HIDDEN)
    for reduce, grad_out in ((torch.sum, torch.ones(TOKENS, HIDDEN)), (lambda out: (out.T * diagonal.T.to(device)).sum(), diagonal)):
        arguments, named = leaves(block, device)
        got = dict(zip(named, torch.autograd.grad(reduce(fused_moe(**arguments)), list(named.values()))))
        assert_gradients(got, expected(block, grad_out)[1], F32)


def test_applied_twice_in_one_graph(device):
    """The same weights in two layers: gradients add up."""
    block = make(bias=BIASES)
    ids = [random_ids(TOKENS, 3, 6), random_ids(TOKENS, 3, 6)]
    results = []
    for function, (arguments, named) in ((fused_moe, leaves(block, device)), (reference, leaves(block, "cpu", F64))):
        x = arguments["hidden_states"]
        for layer_ids in ids:
            x = x + function(**arguments | dict(hidden_states=x, topk_ids=layer_ids.to(x.device)))
        x.square().mean().backward()
        results.append({name: leaf.grad for name, leaf in named.items()})
    assert_gradients(*results, F32)


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
def test_checkpointed(recompute, device):
    block = make(bias=BIASES)
    arguments, named = leaves(block, device)
    grad_out = torch.randn(TOKENS, HIDDEN)
    x = arguments.pop("hidden_states")
    out = checkpoint(lambda x: fused_moe(x, **arguments, recompute=recompute), x, use_reentrant=False)
    out.backward(grad_out.to(device))
    assert_gradients({name: leaf.grad for name, leaf in named.items()}, expected(block, grad_out)[1], F32)


@pytest.mark.parametrize("types", [BF16_ENK, pytest.param(F16_EKN, marks=pytest.mark.full)], ids=["bf16 enk", "f16 ekn"])
def test_under_autocast(types, device):
    """float32 parameters, multiplied in the coarser type, and float32 gradients of them."""
    dtype = types["dtype"]
    block = make(**types | dict(dtype=F32), shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS)))
    arguments, named = leaves(block, device)
    grad_out = torch.randn(TOKENS, HIDDEN).to(dtype)
    with torch.autocast(device.type, dtype):
        out = fused_moe(**arguments)
        with torch.no_grad():
            assert fused_moe(**arguments | dict(shared=None)).dtype == dtype
    assert out.dtype == dtype
    out.backward(grad_out.to(device))
    got = {name: leaf.grad for name, leaf in named.items()}
    assert all(gradient.dtype == named[name].dtype for name, gradient in got.items())
    assert_gradients(got, expected(block, grad_out)[1], dtype)


def test_compile(device):
    block = make(bias=BIASES, shared=make_shared(INTERMEDIATE, weights=torch.rand(TOKENS)))
    arguments, named = leaves(block, device)
    others = {name: value for name, value in arguments.items() if name != "hidden_states"}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x):
        return fused_moe(x, **others) + x

    grad_out = torch.randn(TOKENS, HIDDEN)
    layer(arguments["hidden_states"]).backward(grad_out.to(device))
    want = expected(block, grad_out)[1]
    want["hidden_states"] += grad_out
    assert_gradients({name: leaf.grad for name, leaf in named.items()}, want, F32)


def test_compile_with_any_number_of_tokens(device):
    layer = torch.compile(fused_moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (31, 5):
        block = make(tokens)
        arguments, named = leaves(block, device)
        grad_out = torch.randn(tokens, HIDDEN)
        layer(**arguments).backward(grad_out.to(device))
        assert_gradients({name: leaf.grad for name, leaf in named.items()}, expected(block, grad_out)[1], F32)


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
@pytest.mark.parametrize("options", [BF16_ENK, dict(weight_on_input=True, bias=BIASES)], ids=["bf16", "f32 on input"])
def test_opcheck(options, recompute, device):
    block = make(**options)
    if not recompute:       # unused rows of z, which hold anything, would not compare equal
        block["topk_ids"] %= 6
    arguments, named = leaves(block, device)
    inputs = BLOCK.flatten(call_of(arguments))
    forward = torch.ops.moe_xe.fused_moe_training
    torch.library.opcheck(forward, (*inputs, recompute))
    with torch.no_grad():
        out, *saved = forward(*inputs, recompute)
        for needed in ([True] * 4 + ["b13" in named] * 2, [False, True, False, True, False, False]):
            torch.library.opcheck(torch.ops.moe_xe.fused_moe_training_backward, (torch.randn_like(out), *inputs, *saved, needed))


def test_both_ops_have_an_xpu_kernel():
    for name in ("moe_xe::fused_moe_training", "moe_xe::fused_moe_training_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "XPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@pytest.mark.full       # each number of experts may have other kernels for the weights' gradients
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.integers(0, 90), experts=st.integers(1, 40), layout=st.sampled_from(LAYOUTS), recompute=st.booleans(),
       seed=st.integers(0, 2**31))
def test_any_number_of_tokens_and_experts(device, tokens, experts, layout, recompute, seed):
    torch.manual_seed(seed)
    check(make(tokens, experts, weight_layout=layout), device, recompute=recompute)


@pytest.mark.full       # each size compiles a whole block; test_fused_moe.py has some in forward
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=st.integers(1, 90), intermediate=st.integers(1, 90), top_k=st.integers(1, 8), dtype=st.sampled_from([BF16, F16, F32]),
       seed=st.integers(0, 2**31))
def test_any_size(device, hidden, intermediate, top_k, dtype, seed):
    torch.manual_seed(seed)
    check(make(40, 4, top_k, hidden, intermediate, dtype, gated=False), device)
