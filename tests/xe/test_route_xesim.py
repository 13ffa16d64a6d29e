"""The router as BMG code: against float64, within its operands, and without spills on every Xe GPU."""
from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from moe_xe.isa import ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.route_source import KERNEL_NAME, generate
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.plan.problem import Dtype
from moe_xe.plan.block.routing import GroupScore, RoutingProblem, Scoring, launch_shape

from ..ops.routing.case import assert_routed, expected
from .case import REPORT, decode, encode, missing, padded

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

SCALING = np.float32(1.5)
BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
PROBLEMS = {
    "qwen3": RoutingProblem(128, 8, BF16, renormalize=True),
    "mixtral": RoutingProblem(8, 2, F16, renormalize=True),
    "gpt-oss": RoutingProblem(32, 4, BF16, Scoring.topk_softmax),
    "llama4": RoutingProblem(16, 1, F32, Scoring.sigmoid),
    "deepseek-v2": RoutingProblem(160, 6, BF16, Scoring.softmax, None, 8, 3, GroupScore.max),
    "deepseek-v3": RoutingProblem(256, 8, F32, Scoring.sigmoid, F32, 8, 4, renormalize=True, ids_bits=64),
    "kimi-k2": RoutingProblem(384, 8, BF16, Scoring.sigmoid, F32, renormalize=True),
    "deepseek-v4": RoutingProblem(256, 6, BF16, Scoring.sqrtsoftplus, BF16, renormalize=True),
    "rounded": RoutingProblem(40, 4, F16, Scoring.sigmoid, rounded_scores=True),
    "rounded bf16": RoutingProblem(40, 4, BF16, Scoring.sqrtsoftplus, F32, 4, 2, rounded_scores=True),
    "one": RoutingProblem(1, 1, F32),
    "odd": RoutingProblem(37, 19, BF16, Scoring.softmax, F16),
    "odd groups": RoutingProblem(93, 32, F16, Scoring.softmax, None, 31, 17, GroupScore.top2_sum),
    "largest": RoutingProblem(1024, 32, BF16, Scoring.sqrtsoftplus, F32, 32, 7, renormalize=True),
}

LIKE_OTHERS = ("qwen3", "mixtral", "deepseek-v2", "kimi-k2", "rounded", "odd")


@cache
def dump(problem: RoutingProblem, device: str):
    root = sources_dir()
    return ocloc.build(spirv.compile_to_spirv(generate(problem, None), [f"-I{root / 'include'}", f"-I{root}"]), device)


def routed(problem: RoutingProblem, values: np.ndarray, bias: np.ndarray | None, padding: int, seed: int):
    """Weights and ids of the simulated kernel, and its statistics. Logits have `padding` NaNs behind each row."""
    from xesim import Kernel
    tokens = len(values)
    logits = padded(values, problem.logits, 0, padding)
    weights = np.full((tokens, problem.top_k), np.nan, "f4")
    ids = np.full((tokens, problem.top_k), -7, f"i{problem.ids_bits // 8}")
    stored_bias = None if bias is None else encode(bias, problem.bias)
    groups, size = launch_shape(tokens, is_cpu=False, cores=20)
    stats = Kernel(dump(problem, "bmg"), KERNEL_NAME).launch(
        groups * size, size, [logits, stored_bias, weights, ids, np.int64(tokens), np.int64(logits.shape[1]), SCALING],
        seed=seed)
    assert not stats.warnings, stats.warnings
    return weights, ids, stats


def as_read(values: np.ndarray, dtype: Dtype) -> torch.Tensor:
    return torch.from_numpy(decode(encode(values, dtype), dtype).copy())


NAMES = [pytest.param(name, marks=[pytest.mark.full] * (name in LIKE_OTHERS)) for name in PROBLEMS]


@pytest.mark.few(4)
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_routes(name, padding):
    problem, rng = PROBLEMS[name], np.random.default_rng(padding)
    values = 2 * rng.standard_normal((7, problem.num_experts)).astype("f4")
    bias = rng.standard_normal(problem.num_experts).astype("f4") if problem.bias else None
    weights, ids, stats = routed(problem, values, bias, padding, padding)
    logits, bias = as_read(values, problem.logits), None if bias is None else as_read(bias, problem.bias)
    assert_routed(problem, logits, bias, SCALING.item(), torch.from_numpy(weights), torch.from_numpy(ids))
    assert expected(problem, logits, bias).clear.any()
    if not padding:
        REPORT.append(f"route {name}, E={problem.num_experts} k={problem.top_k}: {stats.total / 7:.0f} instructions a token")


@pytest.mark.parametrize("scoring", Scoring)
def test_nan_infinity_and_ties(scoring):
    problem, rng = RoutingProblem(45, 20, F16, scoring, renormalize=True), np.random.default_rng()
    values = rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -2.0], "f4"), (12, 45))
    values[:4, :] = [[np.nan], [-np.inf], [np.inf], [-0.0]]
    weights, ids, _ = routed(problem, values, None, 0, 0)
    assert_routed(problem, as_read(values, F16), None, SCALING.item(), torch.from_numpy(weights), torch.from_numpy(ids))


@pytest.mark.few(4)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("name", NAMES)
def test_no_spills(name, device):
    summary = summarize(dump(PROBLEMS[name], device), KERNEL_NAME)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
