"""The block in training: a forward pass that keeps what backward needs, the gradients of everything it reads, and their ops."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...plan.block.token_sort import aligned_columns
from ...plan.launch import QUEUE_WORDS
from ...plan.problem import Activation, RowScale
from ...quantized.weight import QuantizedWeight
from ..checks import TORCH_DTYPES
from ..gemm.grouped_gemm import grouped_gemm
from ..gemm.grouped_outer import grouped_outer, weights_gradient
from ..launch import Call, launch, submit
from ..routing.token_sort import Routing, combine, launch_combine, launch_sort
from ..signature import Signature
from ..submission import Submission
from ..training_op import define_training_op
from ..weights import Weight
from .activate import activate_backward, launch_activate
from .activation import apply_activation
from .call import BLOCK, BlockCall

__all__ = ["GRADIENTS", "differentiable_moe", "shared_expert", "topk_gradient"]

# what can have a gradient, in the order in which ops pass flags and results
GRADIENTS = ("hidden_states", "w13", "w2", "topk_weights", "b13", "b2")


@dataclass(frozen=True)
class Saved:
    """What backward needs besides the arguments: the sorted rows (routing/token_sort.py), and the first GEMM's output z
    ([rows, 2I or I], before the activation), empty where backward is to compute it again."""
    tokens_per_expert: torch.Tensor
    row_pairs: torch.Tensor
    row_scales: torch.Tensor
    z: torch.Tensor


def differentiable_moe(call: BlockCall, recompute: bool) -> torch.Tensor:
    """The block with gradients; shared experts by torch's own linear layers."""
    out = torch.ops.moe_xe.fused_moe_training(*BLOCK.flatten(replace(call, shared=None)), recompute)[0]
    return out if call.shared is None else out + shared_expert(call)


def forward(submission: Submission, call: BlockCall, recompute: bool) -> tuple[torch.Tensor, Saved]:
    """The routed experts' part of the block; the launches of inference, and one more for the activation if z is kept."""
    x = call.hidden_states
    num_tokens, hidden_size = x.shape
    num_experts, n13, _ = call.w13.shape
    routing = Routing(call.topk_ids, num_experts, call.expert_map, 0, call.topk_weights, None, call.routed_scaling_factor)
    rows = routing.num_pairs
    out = submission.result(num_tokens, hidden_size, dtype=x.dtype)
    counts, pairs = submission.result(num_experts, dtype=torch.int32), submission.result(rows, dtype=torch.int32)
    scales = submission.result(rows, dtype=torch.float32)
    z = submission.result(0 if recompute else rows, n13, dtype=x.dtype)
    saved = Saved(counts, pairs, scales, z)
    if rows == 0 or out.numel() == 0:
        return out, saved
    queues = submission.empty(2, QUEUE_WORDS, dtype=torch.int32)
    h = submission.empty(rows, call.w2.shape[2], dtype=x.dtype)
    y = submission.empty(rows, aligned_columns(hidden_size, call.y_dtype), dtype=TORCH_DTYPES[call.y_dtype])
    gemm1 = _first_gemm(call, counts, pairs, scales, call.activation if recompute else None)
    gemm2 = Call(h, call.w2, counts, rows, call.b2, pairs, scattered=True, row_scales=scales,
                 row_scale=RowScale.none if call.weight_on_input else RowScale.outputs, choice=call.choice.part("down"),
                 most_rows=len(x))
    launch_sort(submission, routing, tokens_per_expert=counts.data_ptr(), row_pairs=pairs.data_ptr(), row_scales=scales.data_ptr(),
                queue_words=queues.data_ptr(), num_queue_words=queues.numel())
    submit(submission, gemm1, h if recompute else z, queues[0])
    if not recompute:
        launch_activate(submission, z, call.activation, row_pairs=pairs, hs=h)
    submit(submission, gemm2, y[:, :hidden_size], queues[1])
    launch_combine(submission, routing, y, out)
    return out, saved


def backward(submission: Submission, grad_out: torch.Tensor, call: BlockCall, saved: Saved, needed: dict[str, bool]) -> dict[str, torch.Tensor]:
    """The gradients that are needed, by name, each in its argument's shape and dtype; weights' in their memory layout."""
    x, counts, pairs, scales = call.hidden_states, saved.tokens_per_expert, saved.row_pairs, saved.row_scales
    slots = call.topk_ids.shape[1]
    if pairs.numel() == 0 or x.numel() == 0:
        return {name: torch.zeros_like(getattr(call, name)) for name in GRADIENTS if needed[name]}
    grad_out = grad_out.contiguous().to(x.dtype)
    gathered = {"gather_indices": pairs, "gather_divisor": slots}
    z = saved.z if saved.z.numel() else _sums(submission, call, saved)
    on_input = call.weight_on_input
    needs_dz = needed["hidden_states"] or needed["w13"] or needed["b13"] or (on_input and needed["topk_weights"])
    wanted = {"dz": needs_dz, "hs": needed["w2"], "dscale": needed["topk_weights"] and not on_input}
    want = [name for name, is_wanted in wanted.items() if is_wanted]
    result = {}
    if want:
        # of a row without its factor; activate_backward multiplies
        g = grouped_gemm(grad_out, call.w2.transpose(1, 2), counts, **gathered, **call.choice.part("down").part("dX").arguments)
        grads = activate_backward(z, g, call.activation, row_scales=None if on_input else scales, row_pairs=pairs, want=want)
        del g
        if needed["w2"]:
            result["w2"] = weights_gradient(call.w2, grad_out, grads.hs, counts, pairs, None, slots,
                                            choice=call.choice.part("down").part("dW"))
        if needs_dz:
            if on_input:
                _backward_on_input(call, saved, grads.dz, needed, result)
            else:
                _backward_of_first_gemm(call, saved, grads.dz, None, needed, result)
        if needed["topk_weights"] and not on_input:
            result["topk_weights"] = topk_gradient(call, counts, pairs, grads.dscale, grad_out)
    if needed["b2"]:
        ones = torch.ones_like(scales) if on_input else scales
        sums = grouped_outer(ones[:, None], grad_out.float(), counts, gather_indices_right=pairs, gather_divisor=slots)
        result["b2"] = sums[:, 0].to(call.b2.dtype)
    return result


def _first_gemm(call: BlockCall, counts: torch.Tensor, pairs: torch.Tensor, scales: torch.Tensor,
                activation: Activation | None) -> Call:
    """With the activation, or without, for z."""
    return Call(call.hidden_states, call.w13, counts, len(pairs), call.b13, pairs, gathered=True, slots=call.topk_ids.shape[1],
                row_scales=scales, row_scale=RowScale.sums if call.weight_on_input else RowScale.none, activation=activation,
                choice=call.choice.part("gate_up"), most_rows=len(call.hidden_states))


def _sums(submission: Submission, call: BlockCall, saved: Saved) -> torch.Tensor:
    """z again, as the forward pass computed it."""
    z = call.hidden_states.new_empty(len(saved.row_pairs), call.w13.shape[1])
    launch(submission, _first_gemm(call, saved.tokens_per_expert, saved.row_pairs, saved.row_scales, None), z)
    submission.wait()
    return z


def _backward_of_first_gemm(call: BlockCall, saved: Saved, dz: torch.Tensor, dx_pairs: torch.Tensor | None,
                            needed: dict[str, bool], result: dict[str, torch.Tensor]) -> None:
    """dx_pairs: float32 [rows, H] in order of pairs, if it is known already."""
    counts, pairs, slots = saved.tokens_per_expert, saved.row_pairs, call.topk_ids.shape[1]
    if needed["w13"]:
        result["w13"] = weights_gradient(call.w13, dz, call.hidden_states, counts, None, pairs, slots,
                                         choice=call.choice.part("gate_up").part("dW"))
    if needed["b13"]:
        ones = torch.ones(len(pairs), 1, dtype=dz.dtype, device=dz.device)
        result["b13"] = grouped_outer(ones, dz, counts, out_dtype=torch.float32)[:, 0].to(call.b13.dtype)
    if needed["hidden_states"]:
        if dx_pairs is None:
            dx_pairs = _to_pairs(call, dz, counts, pairs)
        result["hidden_states"] = combine(dx_pairs, call.topk_ids, call.w13.shape[0], expert_map=call.expert_map,
                                          out_dtype=call.hidden_states.dtype)


def _to_pairs(call: BlockCall, dz: torch.Tensor, counts: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """dz times the first weights, float32 [rows, H] in order of pairs."""
    return grouped_gemm(dz, call.w13.transpose(1, 2), counts, scatter_indices=pairs, out_dtype=torch.float32,
                        **call.choice.part("gate_up").part("dX").arguments)


def _backward_on_input(call: BlockCall, saved: Saved, dz: torch.Tensor, needed: dict[str, bool],
                       result: dict[str, torch.Tensor]) -> None:
    """Weights that scale the first GEMM's input: its sums' gradient is dz times the weight."""
    counts, pairs, slots = saved.tokens_per_expert, saved.row_pairs, call.topk_ids.shape[1]
    if needed["b13"]:
        _backward_of_first_gemm(call, saved, dz, None, {**dict.fromkeys(GRADIENTS, False), "b13": True}, result)
    dx_pairs = None
    if needed["topk_weights"] or needed["hidden_states"]:
        dx_pairs = _to_pairs(call, dz, counts, pairs)
    if needed["topk_weights"]:
        x = call.hidden_states.float()[:, None]
        dscale = (dx_pairs.view(len(x), slots, -1) * x).sum(-1).flatten()
        result["topk_weights"] = _of_pairs(call, saved, dscale)
    if dx_pairs is not None:
        dx_pairs = dx_pairs * (call.topk_weights.float() * call.routed_scaling_factor).view(-1, 1)
    scaled = (dz * saved.row_scales[:, None]).to(dz.dtype)
    _backward_of_first_gemm(call, saved, scaled, dx_pairs, {**needed, "b13": False}, result)


def topk_gradient(call: BlockCall, counts: torch.Tensor, pairs: torch.Tensor, dscale: torch.Tensor,
                  grad_out: torch.Tensor) -> torch.Tensor:
    """From the gradient of each sorted row's factor, to which the second GEMM's bias adds its share."""
    num_rows, slots = len(pairs), call.topk_ids.shape[1]
    if call.b2 is not None:
        shares = grad_out.float() @ call.b2.float().T
        places = torch.arange(num_rows, dtype=torch.int32, device=pairs.device)
        experts = torch.searchsorted(counts.cumsum(0, dtype=torch.int32), places, right=True).clamp_(max=len(counts) - 1)
        dscale = dscale + shares[pairs.clamp(min=0).long() // slots, experts]
    # rows that no pair has go to one more place
    places = torch.where(pairs < 0, num_rows, pairs.long())
    of_pairs = torch.zeros(num_rows + 1, dtype=dscale.dtype, device=dscale.device).scatter_(0, places, dscale)[:-1]
    return (of_pairs * call.routed_scaling_factor).view(call.topk_weights.shape).to(call.topk_weights.dtype)


def _of_pairs(call: BlockCall, saved: Saved, gradient: torch.Tensor) -> torch.Tensor:
    """[rows] in order of pairs -> topk_weights' gradient; zero for pairs that were dropped."""
    used = torch.zeros(len(gradient) + 1, dtype=torch.bool, device=gradient.device)
    used.scatter_(0, torch.where(saved.row_pairs < 0, len(gradient), saved.row_pairs.long()), True)
    gradient = torch.where(used[:-1], gradient, 0.0) * call.routed_scaling_factor
    return gradient.view(call.topk_weights.shape).to(call.topk_weights.dtype)


def shared_expert(call: BlockCall) -> torch.Tensor:
    """The shared expert with torch's own linear layers, which bring its gradients, or, quantised, with grouped GEMMs of one group."""
    shared = call.shared
    parts = [shared.up_proj] if shared.gate_proj is None else [shared.gate_proj, shared.up_proj]
    h = apply_activation(torch.cat([_linear(call.hidden_states, w) for w in parts], dim=-1), replace(call.activation, interleaved=False))
    y = _linear(h, shared.down_proj)
    return y if shared.weights is None else y * shared.weights.view(-1, 1).to(y.dtype)


def _linear(rows: torch.Tensor, w: Weight) -> torch.Tensor:
    if not isinstance(w, QuantizedWeight):
        return torch.nn.functional.linear(rows, w)
    return grouped_gemm(rows, w, torch.full((1,), rows.shape[0], dtype=torch.int32, device=rows.device))


def _fake_saved(call: BlockCall, recompute: bool) -> Saved:
    x, ids, (num_experts, n13, _) = call.hidden_states, call.topk_ids, call.w13.shape
    rows = ids.numel()
    return Saved(ids.new_empty(num_experts, dtype=torch.int32), ids.new_empty(rows, dtype=torch.int32),
                 ids.new_empty(rows, dtype=torch.float32), x.new_empty(0 if recompute else rows, n13))


define_training_op("fused_moe_training", BLOCK, Signature(Saved), GRADIENTS, forward=forward, backward=backward,
                   fake_saved=_fake_saved)
