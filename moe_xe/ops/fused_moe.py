"""The MoE MLP block: ``sum over a token's experts of weight * down(act(gate_up(token)))``, in as few launches as possible."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan.problem import Activation, ActivationKind
from . import checks
from .grouped_gemm import logical_weights, grouped_gemm
from .activation import apply_activation

__all__ = ["Fusions", "SharedExpert", "fused_moe"]


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token visits. gate_proj (None without a gate), up_proj: [I_s, H]; down_proj: [H, I_s]: the
    weights of linear layers, in the hidden states' dtype. weights: [T] or [T, 1], a factor for each token, or None for one.
    """
    up_proj: torch.Tensor
    down_proj: torch.Tensor
    gate_proj: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Fusions:
    """What is fused into the two GEMMs; each can be switched off, for tests and measurements.

    gather: tokens are gathered by the first GEMM's loads, not copied in sorted order. activation: in the first GEMM's
    epilogue, so that [rows, 2I] is never stored. scatter: un-permutation and weights in the second GEMM's stores. shared:
    shared experts are groups of the same launches.
    """
    gather: bool = True
    activation: bool = True
    scatter: bool = True
    shared: bool = True


@dataclass(frozen=True)
class BlockCall:
    """The checked arguments of one block; w13 is the logical [E, 2I or I, H], w2 the logical [E, H, I]."""
    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    expert_map: torch.Tensor | None
    shared: SharedExpert | None
    activation: Activation
    routed_scaling_factor: float
    weight_on_input: bool


def fused_moe(hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor,
              topk_ids: torch.Tensor, *, activation: str = "silu", interleaved: bool = False, alpha: float = 1.702,
              limit: float | None = None, b13: torch.Tensor | None = None, b2: torch.Tensor | None = None,
              expert_map: torch.Tensor | None = None, shared: SharedExpert | None = None,
              routed_scaling_factor: float = 1.0, weight_on_input: bool = False, weight_layout: str = "enk",
              fusions: Fusions = Fusions()) -> torch.Tensor:
    """The routed experts' MLPs of every token, weighted and summed, plus the shared expert.

    hidden_states: [T, H], bfloat16, float16 or float32. w13: [E, 2I, H], gate rows then up rows (interleaved: gate even, up
    odd), or [E, I, H] without a gate; w2: [E, H, I]; their dtype is hidden_states'. With weight_layout="ekn" they are
    [E, H, 2I] and [E, I, H]. topk_weights: [T, k], a float dtype; topk_ids: [T, k], int32 or int64. An id outside [0, E)
    contributes nothing (expert parallelism's sentinels); a repeated id counts as often as it is there.
    activation: "silu", "gelu", "gelu_tanh", "relu2" or "swiglu_oai" (gpt-oss: alpha, up + 1). limit: gates are cut at most
    to it, up values to [-limit, limit]. b13: [E, 2I], b2: [E, H], any float dtype.
    expert_map: [global experts] int32, a global id's local expert or -1. routed_scaling_factor: multiplies topk_weights.
    weight_on_input: the weights scale the first GEMM's input (Llama-4) instead of the second's output.

    Returns [T, H] in hidden_states' dtype: float32 sums, rounded once. Raises TypeError or ValueError naming the argument.
    """
    call = validate(hidden_states, w13, w2, topk_weights, topk_ids, activation, interleaved, alpha, limit, b13, b2, expert_map,
                    shared, routed_scaling_factor, weight_on_input, weight_layout)
    return _unfused(call)


def validate(hidden_states, w13, w2, topk_weights, topk_ids, activation, interleaved, alpha, limit, b13, b2, expert_map, shared,
             routed_scaling_factor, weight_on_input, weight_layout) -> BlockCall:
    """Checks all that can be known without the device."""
    checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
    checks.check_dtype("hidden_states", hidden_states.dtype)
    w13, w2 = (logical_weights(w, weight_layout, name) for name, w in (("w13", w13), ("w2", w2)))
    num_experts, n13, hidden_size = w13.shape
    for name, w in (("w13", w13), ("w2", w2)):
        if w.dtype != hidden_states.dtype:
            raise TypeError(f"{name} must have hidden_states' dtype {hidden_states.dtype}, got {w.dtype}")
        checks.weight_layout(name, w)
    if hidden_states.shape[1] != hidden_size:
        raise ValueError(f"hidden_states and w13 must agree in H: hidden_states is {checks.shape_of(hidden_states)}, w13 has H = {hidden_size}")
    intermediate_size = w2.shape[2]
    if w2.shape[:2] != (num_experts, hidden_size) or n13 not in (intermediate_size, 2 * intermediate_size) or not w13.numel():
        raise ValueError(f"w13 [E, 2I or I, H] and w2 [E, H, I] must fit together and not be empty, got (as [E, N, K]) "
                         f"{list(w13.shape)} and {list(w2.shape)}")
    num_tokens = hidden_states.shape[0]
    checks.check_tensor("topk_ids", topk_ids, 2, "[T, k]")
    checks.check_tensor("topk_weights", topk_weights, 2, "[T, k]")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    checks.check_dtype("topk_weights", topk_weights.dtype)
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if tensor.shape[0] != num_tokens or tensor.shape != topk_ids.shape or tensor.shape[1] < 1:
            raise ValueError(f"topk_weights and topk_ids must be [T, k] with T = {num_tokens} and k >= 1, got {name} {list(tensor.shape)}")
    for name, bias, size in (("b13", b13, n13), ("b2", b2, hidden_size)):
        if bias is not None:
            checks.check_tensor(name, bias, 2, "[E, N]")
            checks.check_dtype(name, bias.dtype)
            if tuple(bias.shape) != (num_experts, size):
                raise ValueError(f"{name} must be [E, N] = [{num_experts}, {size}], got {list(bias.shape)}")
    if expert_map is not None:
        checks.check_indices("expert_map", expert_map, None, "global experts", (torch.int32,))
    if activation not in ActivationKind.__members__:
        raise ValueError(f"activation must be one of {', '.join(ActivationKind.__members__)}, got {activation!r}")
    gated = n13 == 2 * intermediate_size
    act = Activation(ActivationKind(activation), gated, interleaved and gated, alpha if activation == "swiglu_oai" else 1.0, limit)
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    if shared is not None:
        _check_shared(shared, hidden_states, gated)
    checks.check_same_device(hidden_states=hidden_states, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, b13=b13, b2=b2,
                             expert_map=expert_map, **({} if shared is None else {f"shared.{k}": v for k, v in vars(shared).items()}))
    checks.row_stride("hidden_states", hidden_states)
    return BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, shared, act, routed_scaling_factor, weight_on_input)


def _check_shared(shared: SharedExpert, hidden_states: torch.Tensor, gated: bool) -> None:
    if not isinstance(shared, SharedExpert):
        raise TypeError(f"shared must be a SharedExpert, got {type(shared).__name__}")
    num_tokens, hidden_size = hidden_states.shape
    if gated != (shared.gate_proj is not None):
        raise ValueError(f"shared.gate_proj must be {'given' if gated else 'None'}, as the routed experts have {'a' if gated else 'no'} gate")
    checks.check_tensor("shared.up_proj", shared.up_proj, 2, "[I_s, H]")
    size = shared.up_proj.shape[0]
    for name, shape in (("gate_proj", (size, hidden_size)), ("up_proj", (size, hidden_size)), ("down_proj", (hidden_size, size))):
        w = getattr(shared, name)
        if w is None:
            continue
        checks.check_tensor(f"shared.{name}", w, 2, str(list(shape)))
        if tuple(w.shape) != shape or w.dtype != hidden_states.dtype:
            raise ValueError(f"shared.{name} must be {str(hidden_states.dtype).removeprefix('torch.')}{list(shape)}, got {checks.shape_of(w)}")
        checks.row_stride(f"shared.{name}", w)
    if shared.weights is not None:
        checks.check_dtype("shared.weights", shared.weights.dtype)
        if tuple(shared.weights.shape) not in ((num_tokens,), (num_tokens, 1)):
            raise ValueError(f"shared.weights must be [T] or [T, 1] with T = {num_tokens}, got {list(shared.weights.shape)}")


def _unfused(call: BlockCall) -> torch.Tensor:
    x = call.hidden_states
    num_experts, k = call.w13.shape[0], call.topk_ids.shape[1]
    ids = call.topk_ids.long().flatten()
    if call.expert_map is not None:
        size = call.expert_map.shape[0]
        known = (ids >= 0) & (ids < size)
        ids = torch.where(known, call.expert_map.long()[ids.clamp(0, max(size - 1, 0))], -1)
    valid = (ids >= 0) & (ids < num_experts)
    ids = torch.where(valid, ids, num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=x.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))[:num_experts]
    weights = call.topk_weights.float().flatten() * call.routed_scaling_factor
    h = torch.zeros(len(order), call.w13.shape[1], dtype=torch.float32, device=x.device)
    a = x[order // k]
    grouped_gemm(a, call.w13, counts, out=h)
    ordered = weights[order, None]
    if call.weight_on_input:
        h = h * ordered
    experts = ids[order].clamp(max=num_experts - 1)
    if call.b13 is not None:
        h = h + call.b13.float()[experts]
    h = apply_activation(h, call.activation).to(x.dtype)
    y = torch.zeros(len(order), x.shape[1], dtype=torch.float32, device=x.device)
    grouped_gemm(h, call.w2, counts, out=y)
    if call.b2 is not None:
        y = y + call.b2.float()[experts]
    if not call.weight_on_input:
        y = y * ordered
    y = torch.where(valid[order, None], y, 0.0)
    out = torch.zeros_like(y).index_copy(0, order, y).view(x.shape[0], k, -1).sum(1)
    if call.shared is not None:
        s = call.shared
        parts = [s.up_proj] if s.gate_proj is None else [s.gate_proj, s.up_proj]
        act = Activation(call.activation.kind, call.activation.gated, False, call.activation.alpha, call.activation.limit)
        hs = apply_activation(torch.cat([x.float() @ w.float().T for w in parts], -1), act).to(x.dtype)
        ys = hs.float() @ s.down_proj.float().T
        out = out + (ys if s.weights is None else ys * s.weights.float().view(-1, 1))
    return out.to(x.dtype)
