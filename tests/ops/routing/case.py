"""What route should give, in float64, and whether it does; shared by the tests on devices and on machine code."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_xe.ops.checks import DTYPES
from moe_xe.plan.block.routing import GroupScore, RoutingProblem, Scoring


@dataclass
class Expected:
    """scores, choice: [T, E], what weights are made from and what is chosen by; ids: [T, k]; clear: [T], tokens whose
    choice (and rounded scores) are the same after rounding to float32."""
    scores: torch.Tensor
    choice: torch.Tensor
    ids: torch.Tensor
    clear: torch.Tensor


def expected(problem: RoutingProblem, logits: torch.Tensor, bias: torch.Tensor | None) -> Expected:
    p, x = problem, logits.double()
    scores = {Scoring.softmax: lambda: x.softmax(-1), Scoring.topk_softmax: lambda: x, Scoring.sigmoid: x.sigmoid,
              Scoring.sqrtsoftplus: lambda: torch.logaddexp(x, torch.zeros_like(x)).sqrt()}[p.scoring]()
    clear = torch.ones(len(x), dtype=torch.bool)
    if p.rounded_scores:
        dtype = next(dtype for dtype, name in DTYPES.items() if name is p.logits)
        low, scores, high = ((scores * factor).to(dtype).double() for factor in (1 - 2e-6, 1, 1 + 2e-6))
        clear &= ((low == high) | low.isnan()).all(-1)
    grouped = p.num_groups > 1
    by_score = bias is not None or p.rounded_scores or (grouped and p.group_score is GroupScore.top2_sum)
    choice = (scores if bias is None else scores + bias.double()) if by_score else x
    exact = p.rounded_scores and bias is None
    margin = (0.0 if exact else 1e-5) * choice.nan_to_num(0, 0, 0).abs().amax(-1) if by_score else torch.zeros(len(x))
    open_to = torch.ones_like(choice, dtype=torch.bool)
    if grouped:
        best = falling(choice.unflatten(-1, (p.num_groups, -1)))[0]
        group_scores = best[..., 0] if p.group_score is GroupScore.max else best[..., 0] + best[..., 1]
        ordered, groups = falling(group_scores)
        clear &= gaps(ordered, p.topk_groups) > 2 * margin if by_score and not exact else clear
        open_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, groups[:, :p.topk_groups], True)
        open_to = open_groups.repeat_interleave(p.num_experts // p.num_groups, -1)
    order = falling(choice)[1]
    order = order.gather(-1, (~open_to.gather(-1, order)).sort(dim=-1, stable=True)[1])    # open ones first
    ordered = choice.gather(-1, order)
    for place in range(1, p.top_k + 1):
        clear &= gaps(ordered, place) > margin if by_score and not exact else clear
    return Expected(scores, choice, order[:, :p.top_k], clear)


def falling(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted: numbers by falling value, then NaNs; equal ones in their order."""
    numbers = values.where(~values.isnan(), -torch.inf)
    order = numbers.sort(dim=-1, descending=True, stable=True)[1]
    order = order.gather(-1, values.isnan().gather(-1, order).sort(dim=-1, stable=True)[1])
    return values.gather(-1, order), order


def gaps(ordered: torch.Tensor, place: int) -> torch.Tensor:
    """Between the last one chosen and the first one not chosen."""
    if place == ordered.shape[-1]:
        return torch.full(ordered.shape[:-1], torch.inf, dtype=ordered.dtype)
    return (ordered[..., place - 1] - ordered[..., place]).nan_to_num(torch.inf)


def expected_weights(problem: RoutingProblem, scores: torch.Tensor, ids: torch.Tensor,
                     scaling_factor: float) -> torch.Tensor:
    weights = scores.gather(-1, ids.long())
    if problem.scoring is Scoring.topk_softmax:
        weights = weights.softmax(-1)
    if problem.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling_factor


def assert_routed(problem: RoutingProblem, logits: torch.Tensor, bias: torch.Tensor | None, scaling_factor: float,
                  topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    """On CPU tensors. Ids are compared where rounding cannot change them, weights with those of the ids given."""
    shape = (len(logits), problem.top_k)
    assert topk_weights.shape == topk_ids.shape == shape and topk_weights.dtype == torch.float32
    ids = topk_ids.long()
    assert ((ids >= 0) & (ids < problem.num_experts)).all()
    assert (ids.sort(-1)[0].diff() > 0).all(), "an expert was chosen twice"
    want = expected(problem, logits, bias)
    assert torch.equal(ids[want.clear], want.ids[want.clear])
    judged = want.clear if problem.rounded_scores else slice(None)
    torch.testing.assert_close(topk_weights.double()[judged], expected_weights(problem, want.scores, ids, scaling_factor)[judged],
                               rtol=1e-5, atol=1e-30, equal_nan=True)
