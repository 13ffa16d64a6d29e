"""The gradients of `route`, `sort_tokens` and `combine`, of torch's own operations, so that they have gradients again."""
from __future__ import annotations

import torch

from ...plan.block.routing import Scoring
from . import route as _route, token_sort as _token_sort    # which define the ops

__all__: list[str] = []

_TINY = 1e-20     # renormalisation's, as in routing/route.hpp


def _route_context(ctx, inputs, output):
    router_logits, _, ctx.scoring, _, _, _, _, ctx.renormalize, ctx.scaling_factor, *_ = inputs
    _, topk_ids = output
    ctx.save_for_backward(router_logits, topk_ids)
    ctx.mark_non_differentiable(topk_ids)


def _route_backward(ctx, grad_weights, _):
    """Of the chosen experts' weights with respect to the logits; neither the choice nor rounded_scores has one."""
    logits, topk_ids = ctx.saved_tensors
    x, ids, grad = logits.float(), topk_ids.long(), grad_weights * ctx.scaling_factor
    scoring = Scoring(ctx.scoring)
    of_all = scoring is Scoring.softmax
    scores = {Scoring.softmax: lambda: torch.softmax(x, -1), Scoring.topk_softmax: lambda: torch.softmax(x.gather(1, ids), -1),
              Scoring.sigmoid: lambda: torch.sigmoid(x.gather(1, ids)),
              Scoring.sqrtsoftplus: lambda: torch.nn.functional.softplus(x.gather(1, ids)).sqrt()}[scoring]()
    chosen = scores.gather(1, ids) if of_all else scores
    if ctx.renormalize:     # w = s / sum(s)
        total = chosen.sum(-1, keepdim=True) + _TINY
        grad = (grad - (grad * chosen).sum(-1, keepdim=True) / total) / total
    if of_all:              # ds_i/dx_j = s_i (delta_ij - s_j)
        weighted = grad * chosen
        of_logits = torch.zeros_like(x).scatter_add(1, ids, weighted) - scores * weighted.sum(-1, keepdim=True)
        return of_logits.to(logits.dtype), *_NONE
    if scoring is Scoring.topk_softmax:
        grad = chosen * (grad - (grad * chosen).sum(-1, keepdim=True))
    elif scoring is Scoring.sigmoid:
        grad = grad * chosen * (1 - chosen)
    else:                   # d sqrt(softplus(x)) = sigmoid(x) / (2 sqrt(softplus(x)))
        grad = grad * torch.sigmoid(x.gather(1, ids)) / (2 * chosen)
    return torch.zeros_like(x).scatter_add(1, ids, grad).to(logits.dtype), *_NONE


_NONE = (None,) * 10
torch.library.register_autograd("moe_xe::route", _route_backward, setup_context=_route_context)


def _sort_context(ctx, inputs, output):
    topk_ids, _, topk_weights, _, ctx.num_shared, shared_weights, ctx.factor = inputs
    ctx.top_k = topk_ids.shape[1]
    ctx.dtypes = [None if weights is None else weights.dtype for weights in (topk_weights, shared_weights)]
    counts, row_pairs, _ = output
    ctx.save_for_backward(row_pairs)
    ctx.mark_non_differentiable(counts, row_pairs)


def _sort_backward(ctx, _, __, grad_scales):
    """A row's scale is its pair's weight: its gradient goes to the pair. Rows beyond the last one have no pair."""
    row_pairs, = ctx.saved_tensors
    num_pairs = row_pairs.shape[0]
    places = torch.where(row_pairs < 0, num_pairs, row_pairs.long())
    of_pairs = grad_scales.new_zeros(num_pairs + 1).scatter(0, places, grad_scales)[:-1].view(-1, ctx.top_k + ctx.num_shared)
    routed, shared = (None if dtype is None else part.to(dtype) for part, dtype in zip(
        (of_pairs[:, :ctx.top_k] * ctx.factor, of_pairs[:, ctx.top_k:]), ctx.dtypes))
    return None, None, routed, None, None, shared, None


torch.library.register_autograd("moe_xe::sort_tokens", _sort_backward, setup_context=_sort_context)


def _combine_context(ctx, inputs, output):
    y, topk_ids, ctx.num_experts, expert_map, ctx.num_shared, _ = inputs
    ctx.dtype = y.dtype
    ctx.save_for_backward(topk_ids, expert_map)


def _combine_backward(ctx, grad):
    """A token's gradient is that of each of its pairs, but for dropped ones, which have none."""
    topk_ids, expert_map = ctx.saved_tensors
    ids = topk_ids
    if expert_map is not None:
        last = expert_map.shape[0] - 1
        ids = torch.where((ids >= 0) & (ids <= last), expert_map[ids.clamp(0, last).long()], -1)
    used = torch.nn.functional.pad((ids >= 0) & (ids < ctx.num_experts), (0, ctx.num_shared), value=True)
    of_pairs = torch.where(used[..., None], grad.to(ctx.dtype)[:, None], 0)
    return of_pairs.flatten(0, 1), *(None,) * 5


torch.library.register_autograd("moe_xe::combine", _combine_backward, setup_context=_combine_context)
