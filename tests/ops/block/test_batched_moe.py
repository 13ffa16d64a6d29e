"""The block's two GEMMs on rows of the batched layout, against float64; rows beyond the counts are NaN before and after."""
import pytest
import torch

import moe_xe
from moe_xe.ops.block.batched_moe import BATCHED, BatchedCall, batched_moe
from moe_xe.plan.choice.choice import Choice
from moe_xe.plan.problem import Activation

from .case import HIDDEN, INTERMEDIATE, activated, assert_right

COUNTS, MOST = [3, 0, 40, 1], 40
PLACES = torch.cat([expert * MOST + torch.arange(count) for expert, count in enumerate(COUNTS)])


def make(device, dtype=torch.float32, halves=2, layout="enk"):
    """hidden_states, w13, w2, tokens_per_expert, and biases."""
    x = torch.full((len(COUNTS) * MOST, HIDDEN), float("nan"), dtype=dtype)
    x[PLACES] = torch.randn(len(PLACES), HIDDEN, dtype=dtype)
    w13 = (torch.randn(len(COUNTS), halves * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5).to(dtype)
    w2 = (torch.randn(len(COUNTS), HIDDEN, INTERMEDIATE) * INTERMEDIATE**-0.5).to(dtype)
    if layout == "ekn":
        w13, w2 = (w.transpose(1, 2).contiguous() for w in (w13, w2))
    counts = torch.tensor(COUNTS, dtype=torch.int32)
    biases = dict(b13=torch.randn(len(COUNTS), halves * INTERMEDIATE), b2=torch.randn(len(COUNTS), HIDDEN))
    return [t.to(device) for t in (x.view(len(COUNTS), MOST, HIDDEN), w13, w2, counts)], {name: b.to(device) for name, b in biases.items()}


def check(out, x, w13, w2, counts, b13=None, b2=None, activation="silu", interleaved=False, alpha=1.702, limit=None, weight_layout="enk"):
    x, w13, w2 = (t.cpu().double() for t in (x, w13, w2))
    if weight_layout == "ekn":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    expected = torch.full(x.shape, float("nan"), dtype=torch.float64)
    for expert, count in enumerate(COUNTS):
        sums = x[expert, :count] @ w13[expert].T + (0 if b13 is None else b13[expert].cpu().double())
        y = activated(sums, activation, len(w13[0]) == 2 * INTERMEDIATE, interleaved, alpha, limit) @ w2[expert].T
        expected[expert, :count] = y + (0 if b2 is None else b2[expert].cpu().double())
    flat = out.cpu().flatten(0, 1)
    assert_right(flat[PLACES], expected.flatten(0, 1)[PLACES])
    assert flat[expected.flatten(0, 1).isnan()].isnan().all()


@pytest.mark.parametrize("dtype, options", [
    (torch.float32, {}), (torch.bfloat16, dict(activation="swiglu_oai", interleaved=True, limit=7.0, weight_layout="ekn")),
    pytest.param(torch.float16, dict(activation="gelu", limit=0.7), marks=pytest.mark.full), (torch.float32, dict(activation="relu2"))], ids=str)
def test_activations_and_layouts(dtype, options, device):
    halves = 1 if options.get("activation") == "relu2" else 2
    (x, *rest), biases = make(device, dtype, halves, options.get("weight_layout", "enk"))
    out = torch.full_like(x, float("nan"))
    assert batched_moe(x, *rest, **biases, **options, out=out) is out
    check(out, x, *rest, **biases, **options)


def test_quantised_weights(device):
    (x, w13, w2, counts), _ = make(device, torch.bfloat16)
    w13 = moe_xe.QuantizedWeight.quantize(w13, "fp8_e4m3", group=(1, HIDDEN))
    out = batched_moe(x, w13, w2, counts, out=torch.full_like(x, float("nan")))
    check(out, x, w13.dequantize(torch.bfloat16), w2, counts)


def test_known_calls_and_autotune(fresh_tuner, device):
    arguments, biases = make(device)
    results = [batched_moe(*arguments, **biases, autotune=autotune).flatten(0, 1)[PLACES.to(device)] for autotune in (False, False, False, True)]
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])
    torch.testing.assert_close(results[3], results[0])


def test_compile(device):
    arguments, biases = make(device)
    compiled = torch.compile(lambda *a: batched_moe(*a, **biases) * 2, fullgraph=True, backend="aot_eager")
    places = PLACES.to(device)
    assert torch.equal(compiled(*arguments).flatten(0, 1)[places], batched_moe(*arguments, **biases).flatten(0, 1)[places] * 2)


def test_no_rows_at_all(device):
    (x, w13, w2, counts), biases = make(device)
    assert batched_moe(x[:, :0], w13, w2, counts, **biases).shape == (len(COUNTS), 0, HIDDEN)
    assert batched_moe(x, w13, w2, counts * 0, **biases, out=torch.full_like(x, float("nan"))).isnan().all()


def test_opcheck(device):
    arguments, biases = make(device)
    call = BatchedCall(arguments[0].flatten(0, 1), *arguments[1:], *biases.values(), Activation(), Choice())
    torch.library.opcheck(torch.ops.moe_xe.batched_moe, BATCHED.flatten(call), test_utils=("test_schema", "test_faketensor"))


X, W13, W2, ROWS = torch.randn(2, 5, 8), torch.randn(2, 12, 8), torch.randn(2, 8, 6), torch.tensor([5, 2])
WRONG = {
    "flat rows": (dict(hidden_states=X[0]), ValueError, r"hidden_states must have 3 dimensions \[E, max_rows, H\]"),
    "too few experts": (dict(hidden_states=X[:1]), ValueError, r"hidden_states must be \[E, max_rows, K\] with E = 2 and max_rows = 5"),
    "another H": (dict(hidden_states=X[..., :7].contiguous()), ValueError, "hidden_states and w13 must agree in K"),
    "w2 of another I": (dict(w2=W2[..., :5]), ValueError, "w13 .* and w2 .* must fit together"),
    "b13": (dict(b13=torch.ones(2, 11)), ValueError, r"b13 must be \[E, N\] = \[2, 12\], got \[2, 11\]"),
    "b2": (dict(b2=torch.ones(2, 7)), ValueError, r"b2 must be \[E, N\] = \[2, 8\], got \[2, 7\]"),
    "counts": (dict(tokens_per_expert=ROWS.float()), TypeError, "tokens_per_expert must be int32 or int64"),
    "activation": (dict(activation="tanh"), ValueError, "activation must be one of silu, .* got 'tanh'"),
    "out": (dict(out=torch.empty(2, 5, 7)), ValueError, r"out must be float32\[10, 8\], got float32\[10, 7\]"),
    "out is hidden_states": (dict(out=X), ValueError, "out must not share memory with hidden_states"),
    "a gradient": (dict(w2=W2.clone().requires_grad_()), ValueError, "batched_moe is for inference, but a gradient is asked for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        batched_moe(**dict(hidden_states=X, w13=W13, w2=W2, tokens_per_expert=ROWS) | changes)
