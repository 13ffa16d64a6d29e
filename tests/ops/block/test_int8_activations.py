"""fused_moe with activations="int8": each GEMM's rows as codes, against float64 of the numbers that the codes stand for."""
from __future__ import annotations

import pytest
import torch

from moe_xe import Fusions, QuantizedWeight, fused_moe, fused_moe_workspace_bytes, quantize_rows

from .case import activated, dense, make, make_shared, moved, run

BF16, F32 = torch.bfloat16, torch.float32
MANY = 400          # tokens, of three experts each: more than one launch takes
SEVERAL = Fusions(launches=False)


def block(tokens=31, dtype=F32, **options) -> dict:
    """Arguments of fused_moe with int8 weights, and the option."""
    arguments = make(tokens, dtype=dtype, hidden=50, intermediate=38, **options)
    for name in ("w13", "w2"):
        arguments[name] = QuantizedWeight.quantize(arguments[name], "int8", (1, arguments[name].shape[2]))
    return arguments | dict(activations="int8")


def numbers(x: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize_rows(x)
    return codes.double() * scales.double()[:, None]


def reference(arguments: dict) -> torch.Tensor:
    """Of routed experts, in float64; what is between the GEMMs is in the hidden states' type before it is quantised."""
    x, ids, weights = (arguments[name] for name in ("hidden_states", "topk_ids", "topk_weights"))
    w13, w2, b13, b2 = (arguments.get(name) for name in ("w13", "w2", "b13", "b2"))
    out, tokens = torch.zeros(x.shape, dtype=torch.float64), numbers(x)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        sums = tokens[token] @ dense(w13)[expert].T + (0 if b13 is None else b13[expert].double())
        h = activated(sums, arguments.get("activation", "silu"), True, arguments.get("interleaved", False), 1.702, arguments.get("limit"))
        y = numbers(h.to(x.dtype)) @ dense(w2)[expert].T + (0 if b2 is None else b2[expert].double())
        out.index_add_(0, token, y * weights[token, slot].double()[:, None])
    return out


def assert_near(out: torch.Tensor, want: torch.Tensor) -> None:
    """A few codes between the GEMMs may be the next ones, where a sum was rounded otherwise. All codes' rounding, by half a step at most, makes
    about 6e-3 here in float32, of 3500 codes; a code that is off by a step, as much as twelve of them: 3.5e-4."""
    error = (out.cpu().double() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < {F32: 1.2e-3, BF16: 6e-3}[out.dtype], error


@pytest.mark.parametrize("dtype, options", [
    (F32, dict(activation="swiglu_oai", interleaved=True, limit=2.0, bias=(F32, BF16))), pytest.param(BF16, {}, marks=pytest.mark.full)])
def test_many_tokens(dtype, options, device):
    arguments = block(MANY, dtype, **options)
    out = torch.full((MANY, 50), float("nan"), dtype=dtype, device=device)
    run(arguments, device, out=out)
    assert_near(out, reference(arguments))


def test_few_tokens_are_computed_as_without(device):
    arguments = block()
    without = run(arguments | dict(activations=None), device)
    assert torch.equal(run(arguments, device), without)
    several = run(arguments, device, SEVERAL)
    assert_near(several, reference(arguments))
    assert not torch.equal(several, without)


def test_few_experts_have_many_rows(device):
    """65 rows each are too few for several launches, but not for int8."""
    arguments = block(130)
    assert torch.equal(run(arguments, device), run(arguments, device, SEVERAL))


@pytest.mark.few(1)
@pytest.mark.parametrize("off", ["gather", "activation", "scatter"])
def test_without_a_fusion(off, device):
    arguments = block()
    assert_near(run(arguments, device, Fusions(launches=False, **{off: False})), reference(arguments))


def test_a_shared_expert_is_not_quantised(device):
    arguments = block()
    shared = make_shared(37)
    alone, got = (run(arguments | more, device, SEVERAL).cpu() for more in ({}, dict(shared=shared)))
    x = arguments["hidden_states"].double()
    up, down, gate = (w.double() for w in (shared.up_proj, shared.down_proj, shared.gate_proj))
    assert (got - alone - (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T).abs().max() < 1e-4


def test_workspace(device):
    arguments = block(MANY)
    sizes = (MANY, 3, 50, 38, 6)
    bytes_of = {option: fused_moe_workspace_bytes(*sizes, dtype=F32, activations=option) for option in (None, "int8")}
    assert bytes_of["int8"] - bytes_of[None] >= MANY * 50 + MANY * 3 * 38
    workspace = torch.empty(bytes_of["int8"], dtype=torch.uint8, device=device)
    assert torch.equal(run(arguments, device, workspace=workspace), run(arguments, device))
    with pytest.raises(ValueError, match=f"workspace must have at least {bytes_of['int8']} bytes"):
        run(arguments, device, workspace=workspace[:bytes_of[None]])


def test_equal_calls_repeat_the_launches(device):
    arguments = {name: moved(value, device) for name, value in block(MANY).items()}
    first = fused_moe(**arguments)
    for _ in range(2):
        arguments["hidden_states"] = arguments["hidden_states"].clone()
        assert torch.equal(fused_moe(**arguments), first)
    arguments["hidden_states"] = arguments["hidden_states"] * 2
    assert not torch.equal(fused_moe(**arguments), first)


@pytest.mark.full
def test_compiles_to_one_graph(device):
    arguments = {name: moved(value, device) for name, value in block(MANY).items()}
    compiled = torch.compile(lambda x: fused_moe(**arguments | dict(hidden_states=x)) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["hidden_states"]), fused_moe(**arguments) * 2)


def test_bad_input(device):
    arguments = {name: moved(value, device) for name, value in block().items()}
    dense_w2 = arguments["w2"].dequantize()
    grouped = QuantizedWeight.quantize(arguments["w13"].dequantize(), "int8", (1, 16))
    for changes, error, message in (
            (dict(activations="fp8"), ValueError, "activations must be None or \"int8\", got 'fp8'"),
            (dict(w2=dense_w2), TypeError, "w2 must be a QuantizedWeight in int8 beside activations=\"int8\", got Tensor"),
            (dict(w13=grouped), ValueError, "w13 must be int8 codes .* without zeros, each row with one scale, beside activations=\"int8\"; got int8"),
            (dict(hidden_states=arguments["hidden_states"].clone().requires_grad_()), ValueError, "activations must be None where a gradient is asked")):
        with pytest.raises(error, match=message):
            fused_moe(**arguments | changes)
    with pytest.raises(ValueError, match="activations must be None or"):
        fused_moe_workspace_bytes(1, 2, 8, 8, 4, activations="int4")
