"""The MoE MLP block: ``sum over a token's experts of weight * down(act(gate_up(token)))``, in as few launches as possible."""
from __future__ import annotations

import math

import torch

from ...plan.choice.block_config import MoeConfig
from ...plan.choice.choice import Choice
from ...plan.problem import Activation, ActivationKind
from .. import checks
from ..autocast import autocast
from .autograd import differentiable_moe, wants_gradient
from ..gemm.grouped_gemm import logical_weights
from .stages import BlockCall, Fusions, SharedExpert, run_block, workspace_bytes
from ..routing.token_sort import check_routing

__all__ = ["Fusions", "SharedExpert", "fused_moe", "fused_moe_workspace_bytes"]


def fused_moe(hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor,
              topk_ids: torch.Tensor, *, activation: str = "silu", interleaved: bool = False, alpha: float = 1.702,
              limit: float | None = None, b13: torch.Tensor | None = None, b2: torch.Tensor | None = None,
              expert_map: torch.Tensor | None = None, shared: SharedExpert | None = None,
              routed_scaling_factor: float = 1.0, weight_on_input: bool = False, weight_layout: str = "enk",
              out: torch.Tensor | None = None, workspace: torch.Tensor | None = None, recompute: bool = True,
              config: MoeConfig | None = None, autotune: bool = False, fusions: Fusions | None = None) -> torch.Tensor:
    """The routed experts' MLPs of every token, weighted and summed, plus the shared expert.

    hidden_states: [T, H], bfloat16, float16 or float32. w13: [E, 2I, H], gate rows then up rows (interleaved: gate even, up
    odd), or [E, I, H] without a gate; w2: [E, H, I]; their dtype is hidden_states'. With weight_layout="ekn" they are
    [E, H, 2I] and [E, I, H]. topk_weights: [T, k], a float dtype; topk_ids: [T, k], int32 or int64. An id outside [0, E)
    contributes nothing (expert parallelism's sentinels); a repeated id counts as often as it is there.
    activation: "silu", "gelu", "gelu_tanh", "relu2" or "swiglu_oai" (gpt-oss: alpha, up + 1). limit: gates are cut at most
    to it, up values to [-limit, limit]. b13: [E, 2I], b2: [E, H], any float dtype.
    expert_map: [global experts] int32, a global id's local expert or -1. routed_scaling_factor: multiplies topk_weights.
    weight_on_input: the weights scale the first GEMM's input (Llama-4) instead of the second's output.
    out: [T, H] in hidden_states' dtype, to write to; shares no memory with the inputs. workspace: uint8, at least
    `fused_moe_workspace_bytes` long, for everything in between; by default torch's allocator is asked.
    config: of the two GEMMs and their gradients, instead of moe_xe's choice. autotune: as in `grouped_gemm`, for each of them.

    Differentiable in hidden_states, the weights, biases, topk_weights and the shared expert; in training the shared expert
    uses torch's linear layers, and out and workspace are refused. recompute: backward computes the first GEMM again
    instead of keeping its output, [T * k, 2I].

    Under torch.autocast, hidden_states, w13, w2 and the shared expert's projections are cast to its dtype, which the
    result then has.

    Returns out, or a new [T, H]: float32 sums, rounded once. Raises TypeError or ValueError naming the argument.
    """
    hidden_states, w13, w2 = autocast(hidden_states, w13, w2)
    if isinstance(shared, SharedExpert):
        shared = SharedExpert(*autocast(shared.up_proj, shared.down_proj, shared.gate_proj), shared.weights)
    call = validate(hidden_states, w13, w2, topk_weights, topk_ids, activation, interleaved, alpha, limit, b13, b2, expert_map,
                    shared, routed_scaling_factor, weight_on_input, weight_layout, Choice.of(config, autotune, MoeConfig))
    if wants_gradient(call):
        if out is not None or workspace is not None:
            raise ValueError("out and workspace are for inference, but a gradient is asked for: call it under torch.no_grad()")
        return differentiable_moe(call, recompute)
    fusions = Fusions() if fusions is None else fusions      # no default value: dynamo cannot take a class's instance as one
    if not isinstance(fusions, Fusions):
        raise TypeError(f"fusions must be a Fusions, got {type(fusions).__name__}")
    arguments = _op_arguments(call, fusions)
    if workspace is not None:
        _check_workspace(workspace, call)
    if out is None and workspace is None:
        return torch.ops.moe_xe.fused_moe(*arguments)
    if out is None:
        out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    else:
        checks.check_out(out, tuple(hidden_states.shape), hidden_states.dtype)
        checks.check_same_device(hidden_states=hidden_states, out=out)
    torch.ops.moe_xe.fused_moe_out(*arguments, out, workspace)
    return out


def fused_moe_workspace_bytes(num_tokens: int, top_k: int, hidden_size: int, intermediate_size: int, num_experts: int, *,
                              dtype: torch.dtype = torch.bfloat16, shared_intermediate_size: int = 0) -> int:
    """Bytes of a workspace that is enough for `fused_moe` on up to so many tokens.

    shared_intermediate_size: I_s of the shared expert, if there is one. On the CPU device the kernels' own scratch still
    comes from torch's allocator.
    """
    checks.check_dtype("dtype", dtype)
    return workspace_bytes(num_tokens, top_k, hidden_size, intermediate_size, num_experts, dtype, shared_intermediate_size)


def _check_workspace(workspace: torch.Tensor, call: BlockCall) -> None:
    checks.check_tensor("workspace", workspace, 1, "[bytes]")
    if workspace.dtype != torch.uint8 or not workspace.is_contiguous():
        raise TypeError(f"workspace must be a contiguous uint8 tensor, got {checks.shape_of(workspace)}")
    checks.check_same_device(hidden_states=call.hidden_states, workspace=workspace)
    num_tokens, hidden_size = call.hidden_states.shape
    shared_size = 0 if call.shared is None else call.shared.up_proj.shape[0]
    needed = workspace_bytes(num_tokens, call.topk_ids.shape[1], hidden_size, call.w2.shape[2], call.w2.shape[0],
                             call.hidden_states.dtype, shared_size)
    if workspace.shape[0] < needed:
        raise ValueError(f"workspace must have at least {needed} bytes (fused_moe_workspace_bytes), got {workspace.shape[0]}")


def validate(hidden_states, w13, w2, topk_weights, topk_ids, activation, interleaved, alpha, limit, b13, b2, expert_map, shared,
             routed_scaling_factor, weight_on_input, weight_layout, choice) -> BlockCall:
    """Checks all that can be known without the device."""
    checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
    for name, w in (("w13", w13), ("w2", w2)):
        checks.check_weights_dtype(name, w)
    checks.check_dtype("hidden_states", hidden_states.dtype)
    w13, w2 = (logical_weights(w, weight_layout, name) for name, w in (("w13", w13), ("w2", w2)))
    num_experts, n13, hidden_size = w13.shape
    for name, w in (("w13", w13), ("w2", w2)):
        if w.dtype != hidden_states.dtype:
            raise TypeError(f"{name} must have hidden_states' dtype {hidden_states.dtype}, got {w.dtype}")
        checks.weight_layout(name, w)
    if hidden_states.shape[1] != hidden_size:
        raise ValueError(f"hidden_states and w13 must agree in H: hidden_states is {checks.shape_of(hidden_states)}, "
                         f"w13 has H = {hidden_size}")
    intermediate_size = w2.shape[2]
    if w2.shape[:2] != (num_experts, hidden_size) or n13 not in (intermediate_size, 2 * intermediate_size) or not w13.numel():
        raise ValueError(f"w13 [E, 2I or I, H] and w2 [E, H, I] must fit together and not be empty, got (as [E, N, K]) "
                         f"{list(w13.shape)} and {list(w2.shape)}")
    num_tokens = hidden_states.shape[0]
    checks.check_tensor("topk_weights", topk_weights, 2, "[T, k]")
    check_routing(topk_ids, num_experts, topk_weights=topk_weights, expert_map=expert_map, num_shared=int(shared is not None),
                  routed_scaling_factor=routed_scaling_factor)
    if topk_ids.shape[0] != num_tokens:
        raise ValueError(f"topk_ids must have a row for each of the {num_tokens} hidden_states, got {checks.shape_of(topk_ids)}")
    for name, bias, size in (("b13", b13, n13), ("b2", b2, hidden_size)):
        if bias is not None:
            checks.check_tensor(name, bias, 2, "[E, N]")
            checks.check_dtype(name, bias.dtype)
            if tuple(bias.shape) != (num_experts, size):
                raise ValueError(f"{name} must be [E, N] = [{num_experts}, {size}], got {list(bias.shape)}")
            checks.row_stride(name, bias)
    if activation not in ActivationKind.__members__:
        raise ValueError(f"activation must be one of {', '.join(ActivationKind.__members__)}, got {activation!r}")
    for name, value in (("alpha", alpha), ("limit", limit)):
        if not isinstance(value, (int, float)) and not (name == "limit" and value is None):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not -math.inf < alpha < math.inf or (limit is not None and not 0 < limit < math.inf):
        raise ValueError(f"alpha must be finite and limit positive and finite, got alpha = {alpha}, limit = {limit}")
    gated = n13 == 2 * intermediate_size
    act = Activation(ActivationKind(activation), gated, interleaved and gated, alpha if activation == "swiglu_oai" else 1.0, limit)
    if shared is not None:
        _check_shared(shared, hidden_states, gated)
    checks.check_same_device(hidden_states=hidden_states, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids, b13=b13, b2=b2,
                             expert_map=expert_map, **({} if shared is None else {f"shared.{k}": v for k, v in vars(shared).items()}))
    checks.row_stride("hidden_states", hidden_states)
    return BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, shared, act, routed_scaling_factor,
                     weight_on_input, choice)


def _check_shared(shared: SharedExpert, hidden_states: torch.Tensor, gated: bool) -> None:
    if not isinstance(shared, SharedExpert):
        raise TypeError(f"shared must be a SharedExpert, got {type(shared).__name__}")
    num_tokens, hidden_size = hidden_states.shape
    if gated != (shared.gate_proj is not None):
        raise ValueError(f"shared.gate_proj must be {'given' if gated else 'None'}, as the routed experts have "
                         f"{'a' if gated else 'no'} gate")
    checks.check_tensor("shared.up_proj", shared.up_proj, 2, "[I_s, H]")
    size = shared.up_proj.shape[0]
    for name, shape in (("gate_proj", (size, hidden_size)), ("up_proj", (size, hidden_size)), ("down_proj", (hidden_size, size))):
        w = getattr(shared, name)
        if w is None:
            continue
        checks.check_tensor(f"shared.{name}", w, 2, str(list(shape)))
        if tuple(w.shape) != shape or w.dtype != hidden_states.dtype:
            raise ValueError(f"shared.{name} must be {str(hidden_states.dtype).removeprefix('torch.')}{list(shape)}, "
                             f"got {checks.shape_of(w)}")
        checks.row_stride(f"shared.{name}", w)
    if shared.weights is not None:
        if not isinstance(shared.weights, torch.Tensor):
            raise TypeError(f"shared.weights must be a torch.Tensor [T] or [T, 1], got {type(shared.weights).__name__}")
        checks.check_dtype("shared.weights", shared.weights.dtype)
        if tuple(shared.weights.shape) not in ((num_tokens,), (num_tokens, 1)):
            raise ValueError(f"shared.weights must be [T] or [T, 1] with T = {num_tokens}, got {list(shared.weights.shape)}")


_ARGUMENTS = ("Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? b13, Tensor? b2, "
              "Tensor? expert_map, Tensor? shared_gate, Tensor? shared_up, Tensor? shared_down, Tensor? shared_weights, "
              "str activation, bool interleaved, float alpha, float? limit, float routed_scaling_factor, bool weight_on_input, "
              "str choice, bool[4] fusions")


def _op_arguments(call: BlockCall, fusions: Fusions) -> tuple:
    s, act = call.shared, call.activation
    shared = (None,) * 4 if s is None else (s.gate_proj, s.up_proj, s.down_proj, s.weights)
    return (call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2, call.expert_map, *shared,
            act.kind.value, act.interleaved, act.alpha, act.limit, call.routed_scaling_factor, call.weight_on_input,
            call.choice.text, [fusions.gather, fusions.activation, fusions.scatter, fusions.shared])


def _block_call(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, shared_gate, shared_up, shared_down,
                shared_weights, activation, interleaved, alpha, limit, routed_scaling_factor, weight_on_input, choice) -> BlockCall:
    shared = None if shared_up is None else SharedExpert(shared_up, shared_down, shared_gate, shared_weights)
    gated = w13.shape[1] == 2 * w2.shape[2]
    return BlockCall(hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, expert_map, shared,
                     Activation(ActivationKind(activation), gated, interleaved, alpha, limit), routed_scaling_factor, weight_on_input,
                     Choice.parse(choice))


@torch.library.custom_op("moe_xe::fused_moe", mutates_args=(), device_types=("cpu", "xpu"), schema=f"({_ARGUMENTS}) -> Tensor")
def fused_moe_new(hidden_states, *arguments):
    out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    run_block(_block_call(hidden_states, *arguments[:-1]), Fusions(*arguments[-1]), out, None)
    return out


@torch.library.custom_op("moe_xe::fused_moe_out", mutates_args=("out", "workspace"), device_types=("cpu", "xpu"),
                         schema=f"({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? workspace) -> ()")
def fused_moe_out(*arguments):
    *rest, fusions, out, workspace = arguments
    call = _block_call(*rest)
    shared = {} if call.shared is None else {f"shared.{name}": value for name, value in vars(call.shared).items()}
    inputs = {name: value for name, value in (vars(call) | shared).items() if isinstance(value, torch.Tensor)}
    checks.check_no_overlap(out, **inputs, workspace=workspace)
    run_block(call, Fusions(*fusions), out, workspace)


@torch.library.register_fake("moe_xe::fused_moe")
def _(hidden_states, *arguments):
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.register_fake("moe_xe::fused_moe_out")
def _(*arguments):
    return None
