"""intel_extension_for_pytorch.llm.modules.GatedMLPMOE on moe_xe's kernels; IPEX itself is not needed."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..ops import checks
from ..ops.block.fused_moe import fused_moe
from ..ops.routing.route import route
from ..ops.weights import Weight
from ..quantized import QuantizedWeight
from .arguments import check_bias, check_weight, check_weight_shape, described

__all__ = ["GatedMLPMOE"]

# IPEX's names: activation, alpha, limit, and whether a [E, 2I, H] W13 has its gates in even rows, ups in odd ones
_ACTIVATIONS = {"silu": dict(activation="silu"),
                "swiglu_oai": dict(activation="swiglu_oai", alpha=1.702, limit=7.0, interleaved=True)}


class GatedMLPMOE(nn.Module):
    """Routing and gated experts, with the constructor and the call of IPEX's class.

    W13: [E, 2I, H], gates first (for "swiglu_oai": gates in even rows, ups in odd ones), or the gates alone, [E, I, H],
      with W3, the ups, [E, I, H]: they are joined once, into a copy. W2: [E, H, I]. All bfloat16, float16 or float32, or
      `QuantizedWeight`s of these shapes, W3 if W13 is one.
    use_prepack: accepted; weights are read as they are.
    w13_bias: [E, 2I], rows in W13's order. w2_bias: [E, H].
    autotune: as in `fused_moe`; not an argument of IPEX's.
    experts_start_id: the first of this rank's experts; choices of other ranks' contribute nothing.
    Scales and is_mxfp4, is_fp8 or is_int4 are a ValueError: a QuantizedWeight says all of it. Raises TypeError or ValueError naming
    the argument.
    """

    def __init__(self, W13: Weight, W2: Weight, W3: Weight | None = None, use_prepack: bool = True,
                 w1_scale_inv: torch.Tensor | None = None, w2_scale_inv: torch.Tensor | None = None,
                 a1_scale_inv: torch.Tensor | None = None, a2_scale_inv: torch.Tensor | None = None,
                 w13_bias: torch.Tensor | None = None, w2_bias: torch.Tensor | None = None, is_mxfp4: bool = False,
                 is_fp8: bool = False, is_int4: bool = False, experts_start_id: int = 0, *, autotune: bool = False):
        super().__init__()
        self.autotune = autotune
        scales = dict(w1_scale_inv=w1_scale_inv, w2_scale_inv=w2_scale_inv,
                      a1_scale_inv=a1_scale_inv, a2_scale_inv=a2_scale_inv)
        for name, scale in scales.items():
            if scale is not None:
                raise ValueError(f"{name} must be None, got a {type(scale).__name__}: a quantised weight is a moe_xe.QuantizedWeight")
        for name, quantised in dict(is_mxfp4=is_mxfp4, is_fp8=is_fp8, is_int4=is_int4).items():
            if quantised:
                raise ValueError(f"{name} must be False, got {quantised!r}: a quantised weight is a moe_xe.QuantizedWeight")
        _check_weights(W13, W2, W3)
        num_experts, hidden_size, intermediate_size = W2.shape
        check_bias("w13_bias", w13_bias, [num_experts, 2 * intermediate_size])
        check_bias("w2_bias", w2_bias, [num_experts, hidden_size])
        if not isinstance(experts_start_id, int) or experts_start_id < 0:
            raise ValueError(f"experts_start_id must be an int, at least 0, got {experts_start_id!r}")
        self.W13 = W13 if W3 is None else _joined(W13, W3)
        self.W2 = W2
        self.w13_bias, self.w2_bias = w13_bias, w2_bias
        self.experts_start_id = experts_start_id
        self._interleaved = W3 is None

    def forward(self, hidden_states: torch.Tensor, use_grouped_topk: bool, top_k: int, router_logits: torch.Tensor,
                renormalize: bool, topk_group: int | None = None, num_expert_group: int | None = None,
                custom_routing_function: Callable | None = None, scoring_func: str = "softmax",
                activation: str | None = "silu", e_score_correction_bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] -> [T, H]: routes by router_logits, [T, all ranks' experts], and sums the weighted experts.

        use_grouped_topk: experts come in num_expert_group groups, of which the best topk_group are used; a group counts as
          much as its best expert or, with e_score_correction_bias, [experts], as its two best together.
        renormalize: a token's weights sum to one.
        custom_routing_function: called with hidden_states, gating_output, topk and renormalize=False by name; returns
          weights and ids, [T, top_k]. renormalize applies to them too. It goes before use_grouped_topk.
        scoring_func: "softmax" or "sigmoid", with groups and without. activation: "silu" or "swiglu_oai".
        """
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
        checks.check_tensor("router_logits", router_logits, 2, "[T, experts]")
        if router_logits.shape[0] != hidden_states.shape[0]:
            raise ValueError(f"router_logits must have one row for each of the {hidden_states.shape[0]} tokens, got "
                             f"{checks.shape_of(router_logits)}")
        if custom_routing_function is None:
            topk_weights, topk_ids = _route(use_grouped_topk, top_k, router_logits, renormalize, topk_group,
                                            num_expert_group, scoring_func, e_score_correction_bias)
        else:
            topk_weights, topk_ids = custom_routing_function(hidden_states=hidden_states, gating_output=router_logits,
                                                             topk=top_k, renormalize=False)
            if renormalize:
                topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        options = dict(_ACTIVATIONS[activation])
        options["interleaved"] = self._interleaved and options.get("interleaved", False)
        return fused_moe(hidden_states, self.W13, self.W2, topk_weights, topk_ids - self.experts_start_id,
                         b13=self.w13_bias, b2=self.w2_bias, autotune=self.autotune, **options)


def _check_weights(W13, W2, W3) -> None:
    layout = "[E, 2I, H]" if W3 is None else "[E, I, H]"
    gates = {"W13": W13} | ({} if W3 is None else {"W3": W3})
    for name, w in gates.items():
        check_weight(name, w, layout)
    check_weight("W2", W2, "[E, H, I]")
    num_experts, hidden_size, intermediate_size = W2.shape
    for name, w in gates.items():
        check_weight_shape(name, w, [num_experts, intermediate_size * (2 if W3 is None else 1), hidden_size], "W2", W2)
    if isinstance(W13, QuantizedWeight) != isinstance(W3, QuantizedWeight) and W3 is not None:
        raise TypeError(f"W3 must be quantised if W13 is, and only then, got {described(W3)} and W13 {described(W13)}")


def _joined(W13: Weight, W3: Weight) -> Weight:
    if isinstance(W13, QuantizedWeight):
        return QuantizedWeight.cat((W13, W3), dim=1)
    return torch.cat((W13.detach(), W3.detach()), dim=1)


def _route(use_grouped_topk, top_k, router_logits, renormalize, topk_group, num_expert_group, scoring_func,
           correction_bias) -> tuple[torch.Tensor, torch.Tensor]:
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func must be softmax or sigmoid, got {scoring_func!r}")
    groups = {}
    if use_grouped_topk:
        for name, value in (("topk_group", topk_group), ("num_expert_group", num_expert_group)):
            if value is None:
                raise ValueError(f"{name} must be given with use_grouped_topk, got None")
        groups = dict(num_groups=num_expert_group, topk_groups=topk_group,
                      group_score="max" if correction_bias is None else "top2_sum")
    return route(router_logits, top_k, scoring=scoring_func, correction_bias=correction_bias, renormalize=renormalize,
                 **groups)
