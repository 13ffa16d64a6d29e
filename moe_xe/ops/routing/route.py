"""Routing: the best experts of each token and their weights, in one kernel."""
from __future__ import annotations

import torch

from ...device import facts_of
from ...jit import compile_kernel
from ...jit.route_source import route_source
from ...plan.block.routing import MAX_EXPERTS, MAX_GROUPS, MAX_TOP_K, GroupScore, RoutingProblem, Scoring, launch_shape
from .. import checks
from ..eager import repeats
from ..launch import target_of
from ..library import define
from ..plain import takes_plain_tensors

__all__ = ["route"]

_ID_BITS = {torch.int32: 32, torch.int64: 64}


@repeats
@takes_plain_tensors
def route(router_logits: torch.Tensor, top_k: int, *, scoring: str = "softmax",
          correction_bias: torch.Tensor | None = None, num_groups: int = 1, topk_groups: int = 1,
          group_score: str = "top2_sum", renormalize: bool = False, scaling_factor: float = 1.0,
          ids_dtype: torch.dtype = torch.int32, rounded_scores: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses top_k of the num_experts for each token.

    router_logits: [T, E], bfloat16, float16 or float32, E up to 1024; rows contiguous, with any stride between them.
    top_k: up to 32, and no more than there are experts in topk_groups groups.
    scoring: "softmax" (over all experts), "topk_softmax" (the logits choose, softmax over the chosen), "sigmoid" or
      "sqrtsoftplus" (sqrt(log(1 + exp(logit)))).
    correction_bias: [E] bfloat16, float16 or float32, added to the scores for the choice; weights are without it.
    num_groups, topk_groups: up to 32 equal groups of neighbouring experts; only the best topk_groups groups' are chosen.
    group_score: a group's score, "top2_sum" (its two best experts') or "max" (its best expert's), the bias included.
    renormalize: weights are divided by their sum + 1e-20.
    scaling_factor: multiplies the weights, last.
    ids_dtype: int32 or int64.
    rounded_scores: scores are rounded to router_logits' dtype first, and chosen by as they are then, as vLLM does it in
      PyTorch; neighbouring logits may so have equal scores. By default they stay in float32, and differ wherever float32 does.

    Returns topk_weights [T, top_k] float32 and topk_ids [T, top_k], by falling score (with bias), equal ones by rising
    id; the arithmetic is in float32, and two runs give the same bits. Without a bias or rounding, and unless groups are
    scored by top2_sum, the logits themselves are compared.
    A NaN is chosen only when no number is left, a group whose score is NaN when no other group is; ids are always valid
    and distinct. A token with a NaN has NaN weights under "softmax"; otherwise the chosen NaN has, and with it all that
    are divided by its sum. Infinities are numbers, with softmax's weights as torch computes them.
    Raises TypeError or ValueError naming the argument.
    """
    return torch.ops.moe_xe.route(*_validated(router_logits, top_k, scoring, correction_bias, num_groups, topk_groups, group_score,
                                              renormalize, scaling_factor, ids_dtype, rounded_scores))


def _validated(router_logits, top_k, scoring, correction_bias, num_groups, topk_groups, group_score, renormalize,
               scaling_factor, ids_dtype, rounded_scores) -> tuple:
    """The op's arguments."""
    checks.check_tensor("router_logits", router_logits, 2, "[T, E]")
    checks.check_dtype("router_logits", router_logits.dtype)
    num_experts = router_logits.shape[1]
    if not checks.holds(num_experts >= 1) or not checks.holds(num_experts <= MAX_EXPERTS):
        raise ValueError(f"router_logits must have 1 to {MAX_EXPERTS} experts, got {checks.shape_of(router_logits)}")
    if not checks.holds(router_logits.shape[0] < 2**31):
        raise ValueError(f"router_logits must have fewer than 2^31 tokens, got {router_logits.shape[0]}")
    checks.row_stride("router_logits", router_logits)
    _check_choice("scoring", scoring, Scoring)
    _check_choice("group_score", group_score, GroupScore)
    num_groups = checks.check_count("num_groups", num_groups, 1, MAX_GROUPS)
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts, got {num_groups}")
    topk_groups = checks.check_count("topk_groups", topk_groups, 1, num_groups)
    if num_groups > 1 and group_score == "top2_sum" and num_experts == num_groups:
        raise ValueError(f'group_score "top2_sum" needs groups of two or more experts, got {num_groups} groups of one')
    top_k = checks.check_count("top_k", top_k, 1, min(MAX_TOP_K, topk_groups * (num_experts // num_groups)))
    if correction_bias is not None:
        checks.check_tensor("correction_bias", correction_bias, 1, "[E]")
        checks.check_dtype("correction_bias", correction_bias.dtype)
        if not checks.has_shape(correction_bias, (num_experts,)):
            raise ValueError(f"correction_bias must be [E] = [{num_experts}], got {list(correction_bias.shape)}")
        if num_experts > 1 and not checks.holds(correction_bias.stride(0) == 1):
            raise ValueError(f"correction_bias must be contiguous, got stride {correction_bias.stride(0)}; "
                             f"call .contiguous() on it")
    checks.check_flags(renormalize=renormalize, rounded_scores=rounded_scores)
    scaling_factor = checks.check_float32("scaling_factor", scaling_factor)
    if ids_dtype not in _ID_BITS:
        raise TypeError(f"ids_dtype must be int32 or int64, got {ids_dtype}")
    checks.check_same_device(router_logits=router_logits, correction_bias=correction_bias)
    return (router_logits, top_k, scoring, correction_bias, num_groups, topk_groups, group_score, renormalize, scaling_factor,
            ids_dtype, rounded_scores)


def _check_choice(name: str, value, choices) -> None:
    names = [choice.value for choice in choices]
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def _route(submission, router_logits, top_k, scoring, correction_bias, num_groups, topk_groups, group_score, renormalize,
           scaling_factor, ids_dtype, rounded_scores=False):
    tokens, num_experts = router_logits.shape
    topk_weights = submission.result(tokens, top_k, dtype=torch.float32)
    topk_ids = submission.result(tokens, top_k, dtype=ids_dtype)
    if tokens == 0:
        return topk_weights, topk_ids
    checks.check_addresses(router_logits=router_logits, correction_bias=correction_bias)
    problem = RoutingProblem(
        num_experts, top_k, checks.DTYPES[router_logits.dtype], Scoring(scoring),
        None if correction_bias is None else checks.DTYPES[correction_bias.dtype], num_groups, topk_groups,
        GroupScore(group_score), renormalize, _ID_BITS[ids_dtype], rounded_scores)
    target = target_of(facts_of(submission.queue))
    kernel = compile_kernel(submission.queue, route_source(problem, target.isa))
    submission.launch(kernel, *launch_shape(tokens, target.is_cpu, target.cores), (
        router_logits.data_ptr(), None if correction_bias is None else correction_bias.data_ptr(),
        topk_weights.data_ptr(), topk_ids.data_ptr(), tokens, checks.row_stride("router_logits", router_logits),
        scaling_factor))
    return topk_weights, topk_ids


def _fake(router_logits, top_k, scoring, correction_bias, num_groups, topk_groups, group_score, renormalize, scaling_factor,
          ids_dtype, rounded_scores=False):
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=ids_dtype)


define("route", "(Tensor router_logits, int top_k, str scoring, Tensor? correction_bias, int num_groups, int topk_groups, "
                "str group_score, bool renormalize, float scaling_factor, ScalarType ids_dtype, bool rounded_scores=False) "
                "-> (Tensor, Tensor)", _route, fake=_fake)
