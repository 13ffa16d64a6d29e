"""The arguments of one block: what they are, and what is wrong with them."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan.block.token_sort import default_y_dtype
from ...plan.choice.block_config import MoeConfig
from ...plan.choice.choice import Choice
from ...plan.problem import ACTIVATION_NAMES, Activation, ActivationKind, Dtype
from ...quantized.weight import QuantizedWeight
from .. import checks
from ..autocast import autocast
from ..routing.token_sort import check_routing
from ..signature import Signature
from ..weights import Weight, check_int8_weight, check_weight, logical_weights, tensors_of

__all__ = ["BLOCK", "FUSIONS", "BlockCall", "Fusions", "SharedExpert", "activation_of", "activations_of", "block_call", "y_dtype_of"]


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token visits. gate_proj (None without a gate), up_proj: [I_s, H]; down_proj: [H, I_s]: the
    weights of linear layers, in the hidden states' dtype, or each a `QuantizedWeight` of one expert, [1, N, K]. weights: [T] or [T, 1], a
    factor for each token, or None for one.
    """
    up_proj: Weight
    down_proj: Weight
    gate_proj: Weight | None = None
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Fusions:
    """What is fused into the two GEMMs; each can be switched off, for tests and measurements.

    gather: tokens are gathered by the first GEMM's loads, not copied in sorted order. activation: in the first GEMM's
    epilogue, so that [rows, 2I] is never stored. scatter: un-permutation and weights in the second GEMM's stores. shared:
    shared experts are groups of the same launches. launches: few tokens take one launch, with equal results; with the other four only.
    """
    gather: bool = True
    activation: bool = True
    scatter: bool = True
    shared: bool = True
    launches: bool = True


@dataclass(frozen=True)
class BlockCall:
    """The checked arguments of one block; w13 is the logical [E, 2I or I, H], w2 the logical [E, H, I].

    y_dtype: of the second GEMM's rows, where they are summed by a launch of their own. choice: of configurations, its parts
    "gate_up" and "down" are for the two GEMMs. activations: i8, where the routed experts' GEMMs of many tokens multiply codes.
    """
    hidden_states: torch.Tensor
    w13: Weight
    w2: Weight
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    expert_map: torch.Tensor | None
    shared: SharedExpert | None
    activation: Activation
    routed_scaling_factor: float
    weight_on_input: bool
    y_dtype: Dtype
    choice: Choice = Choice()
    activations: Dtype | None = None


BLOCK = Signature(BlockCall)
FUSIONS = Signature(Fusions)


def block_call(hidden_states, w13, w2, topk_weights, topk_ids, *, activation, interleaved, alpha, limit, b13, b2, expert_map, shared,
               routed_scaling_factor, weight_on_input, weight_layout, y_dtype, config, autotune, activations=None) -> BlockCall:
    """Of the arguments of `fused_moe`, under torch.autocast; checks all that can be known without the device."""
    choice = Choice.of(config, autotune, MoeConfig)
    hidden_states, w13, w2 = autocast(hidden_states, w13, w2)
    if isinstance(shared, SharedExpert):
        shared = SharedExpert(*autocast(shared.up_proj, shared.down_proj, shared.gate_proj), shared.weights)
    checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
    activations = activations_of(activations)
    for name, w in (("w13", w13), ("w2", w2)):
        checks.check_weight_type(name, w)
    w13, w2 = (logical_weights(w, weight_layout, name) for name, w in (("w13", w13), ("w2", w2)))
    for name, w in (("w13", w13), ("w2", w2)):
        check_weight(name, w, "hidden_states", hidden_states)
        if activations is not None:
            check_int8_weight(name, w, 'activations="int8"')
    num_experts, n13, hidden_size = w13.shape
    if not checks.holds(hidden_states.shape[1] == hidden_size):
        raise ValueError(f"hidden_states and w13 must agree in H: hidden_states is {checks.shape_of(hidden_states)}, "
                         f"w13 has H = {hidden_size}")
    intermediate_size = w2.shape[2]
    if w2.shape[:2] != (num_experts, hidden_size) or n13 not in (intermediate_size, 2 * intermediate_size) or 0 in w13.shape:
        raise ValueError(f"w13 [E, 2I or I, H] and w2 [E, H, I] must fit together and not be empty, got (as [E, N, K]) "
                         f"{list(w13.shape)} and {list(w2.shape)}")
    num_tokens = hidden_states.shape[0]
    checks.check_tensor("topk_weights", topk_weights, 2, "[T, k]")
    routing = check_routing(topk_ids, num_experts, topk_weights=topk_weights, expert_map=expert_map,
                            num_shared=int(shared is not None), routed_scaling_factor=routed_scaling_factor)
    if not checks.holds(topk_ids.shape[0] == num_tokens):
        raise ValueError(f"topk_ids must have a row for each of the {num_tokens} hidden_states, got {checks.shape_of(topk_ids)}")
    for name, bias, size in (("b13", b13, n13), ("b2", b2, hidden_size)):
        if bias is not None:
            checks.check_tensor(name, bias, 2, "[E, N]")
            checks.check_dtype(name, bias.dtype)
            if not checks.has_shape(bias, (num_experts, size)):
                raise ValueError(f"{name} must be [E, N] = [{num_experts}, {size}], got {list(bias.shape)}")
            checks.row_stride(name, bias)
    act = activation_of(activation, n13 == 2 * intermediate_size, interleaved, alpha, limit)
    checks.check_flags(weight_on_input=weight_on_input)
    if shared is not None:
        _check_shared(shared, hidden_states, act.gated)
    checks.check_same_device(hidden_states=hidden_states, **tensors_of("w13", w13), **tensors_of("w2", w2), topk_weights=topk_weights,
                             topk_ids=topk_ids, b13=b13, b2=b2, expert_map=expert_map, **({} if shared is None else _tensors_of_shared(shared)))
    checks.row_stride("hidden_states", hidden_states)
    return BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, shared, act, routing.routed_scaling_factor,
                     weight_on_input, y_dtype_of(y_dtype, hidden_states.dtype), choice, activations)


def activations_of(activations: str | None) -> Dtype | None:
    """Of this argument of `fused_moe`."""
    if activations not in (None, "int8"):
        raise ValueError(f'activations must be None or "int8", got {activations!r}')
    return None if activations is None else Dtype.i8


def activation_of(name: str, gated: bool, interleaved: bool, alpha: float, limit: float | None) -> Activation:
    """Of these arguments of `fused_moe`. Raises TypeError or ValueError naming the argument."""
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATION_NAMES)}, got {name!r}")
    alpha = checks.check_float32("alpha", alpha)
    limit = None if limit is None else checks.check_float32("limit", limit, positive=True)
    checks.check_flags(interleaved=interleaved)
    return Activation(ActivationKind(name), gated, interleaved and gated, alpha if name == "swiglu_oai" else 1.0, limit)


def y_dtype_of(y_dtype, hidden_states: torch.dtype) -> Dtype:
    """Of this argument of `fused_moe`, for hidden states of this type."""
    own = checks.DTYPES[hidden_states]
    if y_dtype is None:
        return default_y_dtype(own)
    if y_dtype not in (torch.float32, hidden_states):
        raise TypeError(f"y_dtype must be torch.float32 or hidden_states' {hidden_states}, got {y_dtype}")
    return checks.DTYPES[y_dtype]


def _tensors_of_shared(shared: SharedExpert) -> dict[str, torch.Tensor | None]:
    weights = {name: getattr(shared, name) for name in ("gate_proj", "up_proj", "down_proj")}
    parts = {"shared.weights": shared.weights}
    for name, w in weights.items():
        parts |= {} if w is None else tensors_of(f"shared.{name}", w)
    return parts


def _check_shared(shared: SharedExpert, hidden_states: torch.Tensor, gated: bool) -> None:
    if not isinstance(shared, SharedExpert):
        raise TypeError(f"shared must be a SharedExpert, got {type(shared).__name__}")
    num_tokens, hidden_size = hidden_states.shape
    if gated != (shared.gate_proj is not None):
        raise ValueError(f"shared.gate_proj must be {'given' if gated else 'None'}, as the routed experts have "
                         f"{'a' if gated else 'no'} gate")
    if not isinstance(shared.up_proj, QuantizedWeight):
        checks.check_tensor("shared.up_proj", shared.up_proj, 2, "[I_s, H]")
    size = shared.up_proj.shape[-2]
    for name, shape in (("gate_proj", (size, hidden_size)), ("up_proj", (size, hidden_size)), ("down_proj", (hidden_size, size))):
        w = getattr(shared, name)
        if w is None and name == "gate_proj":
            continue
        if isinstance(w, QuantizedWeight):
            check_weight(f"shared.{name}", w, "hidden_states", hidden_states)
            if w.shape != (1, *shape):
                raise ValueError(f"shared.{name} must be of one expert, {[1, *shape]}, got {list(w.shape)}")
            continue
        checks.check_tensor(f"shared.{name}", w, 2, str(list(shape)))
        if not checks.has_shape(w, shape) or w.dtype != hidden_states.dtype:
            raise ValueError(f"shared.{name} must be {str(hidden_states.dtype).removeprefix('torch.')}{list(shape)}, "
                             f"got {checks.shape_of(w)}")
        checks.row_stride(f"shared.{name}", w)
    if shared.weights is not None:
        if not isinstance(shared.weights, torch.Tensor):
            raise TypeError(f"shared.weights must be a torch.Tensor [T] or [T, 1], got {type(shared.weights).__name__}")
        checks.check_dense("shared.weights", shared.weights)
        checks.check_dtype("shared.weights", shared.weights.dtype)
        if shared.weights.dim() not in (1, 2) or not checks.has_shape(shared.weights, (num_tokens, 1)):
            raise ValueError(f"shared.weights must be [T] or [T, 1] with T = {num_tokens}, got {list(shared.weights.shape)}")
