"""The gradient of `route`: of the chosen experts' weights with respect to the logits; the choice itself has none."""
from __future__ import annotations

import torch

from ...plan.block.routing import Scoring
from . import route as _route    # which defines the op

__all__: list[str] = []

_TINY = 1e-20     # renormalisation's, as in routing/route.hpp


def _setup_context(ctx, inputs, output):
    (router_logits, _, ctx.scoring, correction_bias, _, _, _, ctx.renormalize, ctx.scaling_factor, _), (_, topk_ids) = inputs, output
    ctx.save_for_backward(router_logits, topk_ids)
    ctx.mark_non_differentiable(topk_ids)


def _backward(ctx, grad_weights, _):
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


_NONE = (None,) * 9
torch.library.register_autograd("moe_xe::route", _backward, setup_context=_setup_context)
