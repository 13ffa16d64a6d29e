import threading
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_xe.ops.checks import DTYPES
from moe_xe.ops.routing.route import route
from moe_xe.plan.block.routing import GroupScore, RoutingProblem, Scoring

from .case import assert_routed, expected

pytestmark = pytest.mark.usefixtures("machines_instructions")

SCORINGS = [scoring.value for scoring in Scoring]
NAN, INF = float("nan"), float("inf")


def check(logits, top_k, bias=None, min_clear=0.9, **options):
    """Routes, compares with float64, and returns the result."""
    topk_weights, topk_ids = route(logits, top_k, correction_bias=bias, **options)
    assert topk_ids.dtype == options.get("ids_dtype", torch.int32) and topk_ids.device == logits.device
    problem = RoutingProblem(
        logits.shape[1], top_k, DTYPES[logits.dtype], Scoring(options.get("scoring", "softmax")), None,
        options.get("num_groups", 1), options.get("topk_groups", 1), GroupScore(options.get("group_score", "top2_sum")),
        options.get("renormalize", False), rounded_scores=options.get("rounded_scores", False))
    cpu_bias = None if bias is None else bias.cpu()
    assert_routed(problem, logits.cpu(), cpu_bias, options.get("scaling_factor", 1.0), topk_weights.cpu(), topk_ids.cpu())
    if len(logits):
        assert expected(problem, logits.cpu(), cpu_bias).clear.float().mean() >= min_clear
    return topk_weights, topk_ids


MODELS = {      # E, k and options
    "qwen3": (128, 8, dict(renormalize=True)),
    "mixtral": (8, 2, dict(renormalize=True)),
    "gpt-oss": (32, 4, dict(scoring="topk_softmax")),
    "llama4": (16, 1, dict(scoring="sigmoid")),
    "deepseek-v2": (160, 6, dict(num_groups=8, topk_groups=3, group_score="max", scaling_factor=16.0)),
    "deepseek-v3": (256, 8, dict(scoring="sigmoid", num_groups=8, topk_groups=4, renormalize=True, scaling_factor=2.5,
                                 bias=True)),
    "kimi-k2": (384, 8, dict(scoring="sigmoid", renormalize=True, scaling_factor=2.827, bias=True)),
    "deepseek-v4": (256, 6, dict(scoring="sqrtsoftplus", renormalize=True, scaling_factor=1.5, bias=True)),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_models(model, dtype, device):
    num_experts, top_k, options = MODELS[model]
    options = dict(options)
    bias = torch.rand(num_experts, device=device) if options.pop("bias", False) else None
    logits = 2 * torch.randn(203, num_experts, device=device)
    check(logits.to(dtype), top_k, bias, min_clear=0.7, **options)


@settings(settings.get_profile("compiling"))
@given(tokens=st.integers(0, 40), num_groups=st.integers(1, 32), data=st.data(), scoring=st.sampled_from(SCORINGS),
       group_score=st.sampled_from(["top2_sum", "max"]), dtype=st.sampled_from(list(DTYPES)), renormalize=st.booleans(),
       bias_dtype=st.sampled_from([None, *DTYPES]), ids_dtype=st.sampled_from([torch.int32, torch.int64]))
def test_any_shape(tokens, num_groups, data, scoring, group_score, dtype, renormalize, bias_dtype, ids_dtype):
    group_size = data.draw(st.integers(2, 1024 // num_groups), label="group_size")
    topk_groups = data.draw(st.integers(1, num_groups), label="topk_groups")
    top_k = data.draw(st.integers(1, min(32, topk_groups * group_size)), label="top_k")
    num_experts = num_groups * group_size
    bias = None if bias_dtype is None else torch.randn(num_experts).to(bias_dtype)
    check(2 * torch.randn(tokens, num_experts).to(dtype), top_k, bias, min_clear=0, scoring=scoring, num_groups=num_groups,
          topk_groups=topk_groups, group_score=group_score, renormalize=renormalize, scaling_factor=1.7, ids_dtype=ids_dtype)


@pytest.mark.parametrize("num_experts, top_k", [(1, 1), (33, 32), (1023, 31), (1024, 32),
                                                *(pytest.param(number, number, marks=pytest.mark.full) for number in (2, 7, 16))])
def test_sizes(num_experts, top_k, device):
    check(torch.randn(5, num_experts, device=device), top_k)


def test_equal_logits_are_chosen_by_rising_id(device):
    logits = torch.randint(-2, 3, (50, 77), device=device).to(torch.bfloat16)
    check(logits, 20)
    check(logits * 0, 20)
    signed_zeros = torch.where(torch.rand(50, 77, device=device) < 0.5, -0.0, 0.0).bfloat16()
    _, ids = route(signed_zeros, 20)
    assert torch.equal(ids.cpu(), torch.arange(20, dtype=torch.int32).expand(50, 20))


def test_equal_groups_are_chosen_by_rising_number(device):
    _, ids = route(torch.zeros(3, 40, device=device), 8, num_groups=5, topk_groups=2, scoring="sigmoid")
    assert torch.equal(ids.cpu(), torch.arange(8, dtype=torch.int32).expand(3, 8))


def test_saturated_sigmoids_do_not_tie(device):
    logits = torch.tensor([[100.0, 120.0, 110.0, -500.0, -400.0]], device=device)
    weights, ids = route(logits, 5, scoring="sigmoid")
    assert ids.tolist() == [[1, 2, 0, 4, 3]] and weights.tolist() == [[1, 1, 1, 0, 0]]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("options", [{}, dict(num_groups=4, topk_groups=2),
                                     dict(num_groups=4, topk_groups=2, group_score="max")])
def test_ids_are_valid_whatever_the_logits(scoring, options, device):
    choices = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-45])
    for bias in (None, torch.randn(20), choices[torch.randint(10, (20,))]):
        logits = choices[torch.randint(10, (200, 20))].to(device)
        logits[:10] = choices[:, None].to(device)
        bias = None if bias is None else bias.to(device)
        _, ids = route(logits, 10, scoring=scoring, correction_bias=bias, renormalize=True, **options)
        assert ((ids >= 0) & (ids < 20)).all() and (ids.sort(-1)[0].diff() > 0).all()


def test_rounded_scores_tie_as_vllm_has_them(device):
    """vLLM takes the sigmoid in the logits' dtype, in which these two are equal."""
    logits = torch.tensor([[4.0, 4.00390625]], dtype=torch.float16, device=device)
    scores = logits.sigmoid()
    assert scores[0, 0] == scores[0, 1]
    weights, ids = route(logits, 1, scoring="sigmoid", rounded_scores=True)
    assert ids.item() == 0 and weights.item() == scores[0, 0].item()
    weights, ids = route(logits, 1, scoring="sigmoid")
    assert ids.item() == 1 and weights.item() == pytest.approx(torch.sigmoid(torch.tensor(4.00390625)).item(), abs=1e-7)


@pytest.mark.parametrize("dtype, scoring, options", [
    (torch.float16, "sigmoid", dict(renormalize=True)), (torch.bfloat16, "sigmoid", dict(num_groups=4, topk_groups=2, bias=True)),
    (torch.float16, "sqrtsoftplus", {}), *(pytest.param(*case, marks=pytest.mark.full) for case in [
        (torch.bfloat16, "softmax", dict(num_groups=4, topk_groups=2)), (torch.float16, "topk_softmax", {})])], ids=str)
def test_rounded_scores(dtype, scoring, options, device):
    bias = torch.rand(20, device=device) if options.get("bias") else None
    options = {name: value for name, value in options.items() if name != "bias"}
    logits = (2 * torch.randn(150, 20, device=device)).to(dtype)
    weights, _ = check(logits, 5, bias, min_clear=0.5, scoring=scoring, rounded_scores=True, **options)
    if scoring != "topk_softmax" and not options.get("renormalize"):
        assert torch.equal(weights.to(dtype).float(), weights)


@pytest.mark.parametrize("scoring", [scoring if scoring == "sigmoid" else pytest.param(scoring, marks=pytest.mark.full) for scoring in SCORINGS])
def test_nan_is_chosen_last(scoring, device):
    logits = torch.randn(40, 30, device=device)
    logits[torch.rand_like(logits) < 0.5] = NAN
    logits[0], logits[1], logits[2, 5] = NAN, -INF, -INF
    check(logits, 20, scoring=scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_infinite_logits(scoring, device):
    logits = torch.randn(40, 20, device=device)
    logits[torch.rand_like(logits) < 0.6] = -INF        # fewer numbers than are chosen
    logits[20:][torch.rand(20, 20, device=device) < 0.1] = INF
    check(logits, 10, scoring=scoring, renormalize=True)


def test_tiny_scores_keep_their_digits(device):
    logits = torch.linspace(-60, 60, 241, device=device).reshape(-1, 1).expand(241, 2).contiguous()
    for scoring in ("sigmoid", "sqrtsoftplus"):
        check(logits, 2, scoring=scoring)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_any_stride(dtype, device):
    wide = torch.randn(31, 61, dtype=dtype, device=device)
    check(wide[:, 3:40], 5)
    check(wide[::3, 1:38], 5)
    check(wide[:1, 3:40].expand(9, 37), 5)
    check(wide[:, 7:8], 1)


def test_every_result_and_nothing_else_is_written(device):
    boxes = []

    def poisoned(submission, tokens, top_k, dtype):
        boxes.append(torch.full((tokens + 2, top_k), NAN if dtype.is_floating_point else -7, dtype=dtype, device=device))
        return boxes[-1][1:-1]

    with patch("moe_xe.ops.submission.Submission.result", poisoned):
        weights, ids = route(torch.randn(7, 90, device=device), 11)
    assert not weights.isnan().any() and (ids >= 0).all()
    assert boxes[0][[0, 8]].isnan().all() and (boxes[1][[0, 8]] == -7).all()


def test_repeatable_and_independent_of_the_other_tokens(device):
    logits = torch.randn(300, 129, device=device)
    bias = torch.rand(129, device=device)
    options = dict(scoring="sigmoid", correction_bias=bias, num_groups=3, topk_groups=2, renormalize=True)
    first, again = route(logits, 9, **options), route(logits, 9, **options)
    order = torch.randperm(300, device=device)
    moved = route(logits[order], 9, **options)
    for x, y, z in zip(first, again, moved):
        assert torch.equal(x, y) and torch.equal(x[order], z)


def test_no_tokens(device):
    weights, ids = route(torch.empty(0, 64, device=device), 4, ids_dtype=torch.int64)
    assert weights.shape == ids.shape == (0, 4) and ids.dtype == torch.int64


def test_threads(device):
    results = [None] * 4

    def work(i):
        results[i] = check(torch.randn(50, 90, device=device), 11)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results)


LOGITS = torch.zeros(3, 12)
BAD = [
    (dict(router_logits=[1.0]), TypeError, "router_logits must be a torch.Tensor"),
    (dict(router_logits=torch.zeros(12)), ValueError, "router_logits must have 2 dimensions"),
    (dict(router_logits=LOGITS.double()), TypeError, "router_logits must be bfloat16"),
    (dict(router_logits=torch.zeros(12, 3).t()), ValueError, "router_logits's rows must be contiguous"),
    (dict(router_logits=torch.zeros(3, 0)), ValueError, "router_logits must have 1 to 1024 experts"),
    (dict(router_logits=torch.zeros(3, 1025)), ValueError, "router_logits must have 1 to 1024 experts"),
    (dict(top_k=0), ValueError, "top_k must be from 1 to 12, got 0"),
    (dict(top_k=13), ValueError, "top_k must be from 1 to 12, got 13"),
    (dict(top_k=7, num_groups=4, topk_groups=2), ValueError, "top_k must be from 1 to 6, got 7"),
    (dict(router_logits=torch.zeros(3, 50), top_k=33), ValueError, "top_k must be from 1 to 32, got 33"),
    (dict(top_k=2.0), TypeError, "top_k must be an int, got float"),
    (dict(top_k=True), TypeError, "top_k must be an int, got bool"),
    (dict(scoring="relu"), ValueError, "scoring must be one of softmax, topk_softmax, sigmoid, sqrtsoftplus, got 'relu'"),
    (dict(group_score="mean"), ValueError, "group_score must be one of top2_sum, max, got 'mean'"),
    (dict(num_groups=5), ValueError, "num_groups must divide the 12 experts, got 5"),
    (dict(num_groups=0), ValueError, "num_groups must be from 1 to 32"),
    (dict(router_logits=torch.zeros(3, 66), num_groups=33), ValueError, "num_groups must be from 1 to 32"),
    (dict(num_groups=4, topk_groups=5), ValueError, "topk_groups must be from 1 to 4, got 5"),
    (dict(topk_groups=2), ValueError, "topk_groups must be from 1 to 1, got 2"),
    (dict(num_groups=12, topk_groups=6), ValueError, "top2_sum.*groups of two or more"),
    (dict(correction_bias=[0.0] * 12), TypeError, "correction_bias must be a torch.Tensor"),
    (dict(correction_bias=torch.zeros(11)), ValueError, r"correction_bias must be \[E\] = \[12\], got \[11\]"),
    (dict(correction_bias=torch.zeros(12, dtype=torch.int32)), TypeError, "correction_bias must be bfloat16"),
    (dict(correction_bias=torch.zeros(24)[::2]), ValueError, "correction_bias must be contiguous"),
    (dict(correction_bias=torch.zeros(12, device="meta")), ValueError, "correction_bias is on meta"),
    (dict(renormalize=1), TypeError, "renormalize must be a bool"),
    (dict(rounded_scores=0), TypeError, "rounded_scores must be a bool, got int"),
    (dict(scaling_factor=1e39), ValueError, "scaling_factor must be finite in float32, got scaling_factor = 1e[+]39"),
    (dict(top_k=10**5000), ValueError, "top_k must be from 1 to 12, got an int of 16610 bits"),
    (dict(scaling_factor="2"), TypeError, "scaling_factor must be a number, got str"),
    (dict(ids_dtype=torch.int16), TypeError, "ids_dtype must be int32 or int64, got torch.int16"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        route(**{"router_logits": LOGITS, "top_k": 2, **arguments})


@pytest.mark.parametrize("bias, ids_dtype", [pytest.param(False, torch.int32, marks=pytest.mark.full), (True, torch.int64)])
def test_opcheck(bias, ids_dtype, device):
    logits = torch.randn(9, 24, device=device)
    correction_bias = torch.rand(24, device=device) if bias else None
    arguments = (logits, 5, "sigmoid", correction_bias, 4, 2, "top2_sum", True, 2.5, ids_dtype)
    torch.library.opcheck(torch.ops.moe_xe.route, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile_fullgraph(backend, device):
    @torch.compile(fullgraph=True, backend=backend)
    def block(logits, bias):
        weights, ids = route(logits * 2, 4, scoring="sigmoid", correction_bias=bias, renormalize=True)
        return weights + 1, ids + 1

    logits, bias = torch.randn(20, 32, device=device), torch.rand(32, device=device)
    weights, ids = block(logits, bias)
    want_weights, want_ids = route(logits * 2, 4, scoring="sigmoid", correction_bias=bias, renormalize=True)
    torch.testing.assert_close(weights - 1, want_weights, rtol=0, atol=1e-6)
    assert torch.equal(ids - 1, want_ids)


def test_fake_xpu_tensors():
    with FakeTensorMode():
        weights, ids = route(torch.empty(50, 64, dtype=torch.bfloat16, device="xpu"), 6, ids_dtype=torch.int64)
    assert (weights.shape, weights.dtype, weights.device.type) == ((50, 6), torch.float32, "xpu")
    assert (ids.shape, ids.dtype, ids.device.type) == ((50, 6), torch.int64, "xpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("moe_xe::route", "XPU")
