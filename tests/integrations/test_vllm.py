"""The vLLM adapter against loops in float64, on odd sizes; outputs start as NaN."""
import enum

import pytest
import torch
import torch.nn.functional as F

from moe_xe.integrations.vllm import BatchedExperts, XpuFusedMoe, xpu_fused_moe
from tests.ops.block.case import HIDDEN, INTERMEDIATE


EXPERTS, TOP_K = 5, 3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def swiglu_oai(h):
    gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def gated(function, limit=float("inf")):
    def act(h):
        gate, up = h.chunk(2)
        return function(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return act


ACTIVATIONS = {"silu": gated(F.silu), "gelu": gated(F.gelu), "gelu_tanh": gated(lambda g: F.gelu(g, approximate="tanh")),
               "swigluoai": swiglu_oai, "relu2_no_mul": lambda h: h.relu() ** 2}


def make(dtype=torch.float32, halves=2, num_experts=EXPERTS, tokens=7):
    """hidden_states, w13 [E, H, N], w13_bias, w2 [E, I, H], w2_bias, topk_weights, topk_ids."""
    def random(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    ids = torch.rand(tokens, num_experts).topk(TOP_K).indices.int()
    return (random(tokens, HIDDEN), random(num_experts, HIDDEN, halves * INTERMEDIATE, scale=HIDDEN**-0.5),
            random(num_experts, halves * INTERMEDIATE), random(num_experts, INTERMEDIATE, HIDDEN, scale=INTERMEDIATE**-0.5),
            random(num_experts, HIDDEN), torch.rand(tokens, TOP_K), ids)


def reference(x, w13, b13, w2, b2, weights, ids, act, local=lambda e: e):
    out = torch.zeros(x.shape, dtype=torch.float64)
    x, w13, w2 = x.double(), w13.double(), w2.double()
    for t, k in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = local(int(ids[t, k]))
        if e is not None:
            h = x[t] @ w13[e] + (0 if b13 is None else b13[e].double())
            out[t] += float(weights[t, k]) * (act(h) @ w2[e] + (0 if b2 is None else b2[e].double()))
    return out


def run(x, w13, b13, w2, b2, weights, ids, activation, num_experts=EXPERTS, **options):
    output = torch.full_like(x, float("nan"))
    experts = XpuFusedMoe(w13=w13, w13_scales=None, w13_bias=b13, w2=w2, w2_scales=None, w2_bias=b2, n_experts_per_token=TOP_K,
                          activation=activation, num_experts=num_experts, **options)
    assert experts.apply(output=output, hidden_states=x, topk_weights=weights, topk_ids=ids) is None
    return output


def assert_close(actual, expected):
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dtypes(dtype, with_bias):
    x, w13, b13, w2, b2, weights, ids = make(dtype)
    if not with_bias:
        b13 = b2 = None
    assert_close(run(x, w13, b13, w2, b2, weights, ids, "silu"), reference(x, w13, b13, w2, b2, weights, ids, ACTIVATIONS["silu"]))


@pytest.mark.few(2)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    case = make(halves=1 if activation == "relu2_no_mul" else 2)
    member = enum.Enum("MoEActivation", {activation.upper(): activation})(activation)
    assert_close(run(*case, member), reference(*case, ACTIVATIONS[activation]))


def test_clamp():
    x, w13, b13, *rest = make()
    case = (x * 3, w13, b13, *rest)
    assert_close(run(*case, "silu", gemm1_clamp_limit=0.7), reference(*case, gated(F.silu, 0.7)))
    assert torch.equal(run(*case, "silu", gemm1_clamp_limit=0), run(*case, "silu"))


@pytest.mark.parametrize("given", ["ranks", "expert_map", "expert_map of apply"])
def test_expert_parallel_ranks_sum_to_the_whole(given):
    ranks = 3
    x, w13, b13, w2, b2, weights, ids = make(num_experts=ranks * EXPERTS)
    act = ACTIVATIONS["silu"]
    order = torch.randperm(ranks * EXPERTS) if given != "ranks" else torch.arange(ranks * EXPERTS)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in range(ranks):
        mine = order[rank * EXPERTS:][:EXPERTS]
        expert_map = torch.full((ranks * EXPERTS,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(EXPERTS, dtype=torch.int32)
        local = (x, w13[mine], b13[mine], w2[mine], b2[mine], weights, ids)
        if given == "expert_map of apply":
            experts = XpuFusedMoe(local[1], None, local[2], local[3], None, local[4], TOP_K, "silu", EXPERTS, rank, ranks)
            output = torch.full_like(x, float("nan"))
            experts.apply(output, x, weights, ids, expert_map)
        else:
            output = run(*local, "silu", ep_rank=rank, ep_size=ranks, expert_map=None if given == "ranks" else expert_map)
        positions = {int(e): i for i, e in enumerate(mine)}
        assert_close(output, reference(*local, act, positions.get))
        total += output
    torch.testing.assert_close(total, reference(x, w13, b13, w2, b2, weights, ids, act), rtol=1e-5, atol=1e-4)


def test_function_and_views():
    x, w13, b13, w2, b2, weights, ids = make(tokens=1)
    expected = reference(x, w13, b13, w2, b2, weights, ids, ACTIVATIONS["silu"])
    arguments = (w13, None, b13, w2, None, b2, weights, ids, TOP_K, "silu", EXPERTS)
    assert_close(xpu_fused_moe(x, *arguments), expected)
    output = torch.full_like(x, float("nan"))
    assert xpu_fused_moe(x, *arguments, output=output) is output
    assert_close(output, expected)
    enk = w13.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(xpu_fused_moe(x, enk, None, b13, w2, None, b2, weights, ids.long(), *arguments[8:]), expected)
    in_place = x.clone()
    assert_close(xpu_fused_moe(in_place, *arguments, output=in_place), expected)


X, W13, B13, W2, B2, WEIGHTS, IDS = make()
WRONG = {
    "scales": (dict(w13_scales=torch.ones(EXPERTS)), ValueError, r"w13_scales must be None for torch.float32 weights, got float32\[5\]"),
    "scales of w2": (dict(w2_scales=torch.ones(EXPERTS)), ValueError, "w2_scales must be None for torch.float32 weights"),
    "fp8": (dict(is_fp8=True), ValueError, r"is_fp8 must be False for w13 float32\[5, 50, 74\] with w13_scales None, got True"),
    "block fp8": (dict(is_block_fp8=True), ValueError, "is_block_fp8 must be False"),
    "4-bit weights": (dict(w13=W13.to(torch.uint8), w2=W2.to(torch.uint8)), TypeError, "w13 must be bfloat16, float16 or float32, got torch.uint8; a quantised weight"),
    "unknown activation": (dict(activation="situ"), ValueError, "activation must be one of silu, .* got 'situ'"),
    "[E, N, K] weights": (dict(w13=W13.transpose(1, 2)), ValueError, r"w13 must be float32\[5, 50, 74\] for w2 float32\[5, 37, 50\]"),
    "a gate too many": (dict(activation="relu2_no_mul"), ValueError, r"w13 must be float32\[5, 50, 37\]"),
    "other experts": (dict(num_experts=6), ValueError, "num_experts = 6"),
    "clamp without a gate": (dict(activation="relu2_no_mul", w13=W13[..., :37].contiguous(), w13_bias=None, gemm1_clamp_limit=2.0), ValueError, "gemm1_clamp_limit must be None"),
    "rank beyond the ranks": (dict(ep_rank=2, ep_size=2), ValueError, r"ep_rank must lie in \[0, ep_size\), got ep_rank = 2 and ep_size = 2"),
    "another k": (dict(n_experts_per_token=2), ValueError, r"n_experts_per_token = 2, got \[7, 3\]"),
    "output's shape": (dict(output=X[:2].clone()), ValueError, r"output must be float32\[7, 50\] as hidden_states, got float32\[2, 50\]"),
    "output's dtype": (dict(output=X.half()), ValueError, "output must be float32"),
    "biases of another shape": (dict(w13_bias=B13[:, :3]), ValueError, r"w13_bias must be \[5, 74\], got \[5, 3\]"),
    "an int bias": (dict(w2_bias=B2.int()), TypeError, "w2_bias must be bfloat16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    changes, error, message = WRONG[case]
    arguments = dict(hidden_states=X, w13=W13, w13_scales=None, w13_bias=B13, w2=W2, w2_scales=None, w2_bias=B2, topk_weights=WEIGHTS,
                     topk_ids=IDS, n_experts_per_token=TOP_K, activation="silu", num_experts=EXPERTS)
    with pytest.raises(error, match=message):
        xpu_fused_moe(**arguments | changes)


def test_quantised_activations():
    experts = XpuFusedMoe(W13, None, B13, W2, None, B2, TOP_K, "silu", EXPERTS)
    with pytest.raises(ValueError, match="a1q_scale must be None"):
        experts.apply(torch.empty_like(X), X, WEIGHTS, IDS, a1q_scale=torch.ones(7, 1))


@pytest.mark.parametrize("activation", [pytest.param("silu", marks=pytest.mark.full), "swigluoai"])
def test_batched_experts(activation):
    """What vLLM's batched prepare and finalize do around them: rows of each expert, then their weighted sums."""
    x, w13, b13, w2, b2, weights, ids = make()
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS).int()
    rows = torch.full((EXPERTS, len(x), HIDDEN), float("nan"))
    places = torch.zeros_like(ids)
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows[expert, :len(token)] = x[token]
        places[token, slot] = torch.arange(len(token), dtype=torch.int32)
    output = torch.full_like(rows, float("nan"))
    experts = BatchedExperts(w13, None, b13, w2, None, b2, activation, EXPERTS)
    assert experts.apply(output, rows, counts) is None
    assert torch.equal(output.isnan().all(-1), torch.arange(len(x)) >= counts[:, None])
    total = (output[ids.long(), places.long()] * weights[..., None]).sum(1)
    assert_close(total, reference(x, w13, b13, w2, b2, weights, ids, ACTIVATIONS[activation]))


ROWS = torch.randn(EXPERTS, 7, HIDDEN)
WRONG_BATCHES = {
    "flat": (dict(hidden_states=X, output=X.clone()), ValueError, r"hidden_states must have 3 dimensions \[E, max_num_tokens, H\]"),
    "output's shape": (dict(output=ROWS[:, :2].clone()), ValueError, r"output must be float32\[5, 7, 50\] as hidden_states, got float32\[5, 2, 50\]"),
    "counts": (dict(expert_num_tokens=torch.zeros(4, dtype=torch.int32)), ValueError, "expert_num_tokens must have one entry for each of the 5 experts"),
    "another number of experts": (dict(hidden_states=ROWS[1:], output=ROWS[1:].clone()), ValueError, "hidden_states must be .* with E = 5"),
    "scales": (dict(a1q_scale=torch.ones(5)), ValueError, "a1q_scale must be None"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_bad_batches(case):
    changes, error, message = WRONG_BATCHES[case]
    arguments = dict(output=torch.empty_like(ROWS), hidden_states=ROWS, expert_num_tokens=torch.zeros(EXPERTS, dtype=torch.int32))
    with pytest.raises(error, match=message):
        BatchedExperts(W13, None, B13, W2, None, B2, "silu", EXPERTS).apply(**arguments | changes)
