"""The MoE MLP block: ``sum over a token's experts of weight * down(act(gate_up(token)))``, in as few launches as possible."""
from __future__ import annotations

import torch

from ...plan.choice.block_config import MoeConfig
from ...plan.problem import INT32_MAX
from .. import checks
from ..eager import repeats
from ..library import define
from ..plain import takes_plain_tensors
from ..training_op import wants_gradient
from ..weights import Weight
from .call import BLOCK, FUSIONS, BlockCall, Fusions, SharedExpert, activations_of, block_call, y_dtype_of
from .stages import run_block, workspace_bytes
from .training import differentiable_moe

__all__ = ["Fusions", "SharedExpert", "fused_moe", "fused_moe_workspace_bytes"]


@repeats
@takes_plain_tensors
def fused_moe(hidden_states: torch.Tensor, w13: Weight, w2: Weight, topk_weights: torch.Tensor,
              topk_ids: torch.Tensor, *, activation: str = "silu", interleaved: bool = False, alpha: float = 1.702,
              limit: float | None = None, b13: torch.Tensor | None = None, b2: torch.Tensor | None = None,
              expert_map: torch.Tensor | None = None, shared: SharedExpert | None = None,
              routed_scaling_factor: float = 1.0, weight_on_input: bool = False, weight_layout: str = "enk",
              out: torch.Tensor | None = None, workspace: torch.Tensor | None = None, recompute: bool = True,
              y_dtype: torch.dtype | None = None, activations: str | None = None, config: MoeConfig | None = None,
              autotune: bool = False, fusions: Fusions | None = None) -> torch.Tensor:
    """The routed experts' MLPs of every token, weighted and summed, plus the shared expert.

    hidden_states: [T, H], bfloat16, float16 or float32. w13: [E, 2I, H], gate rows then up rows (interleaved: gate even, up
    odd), or [E, I, H] without a gate; w2: [E, H, I]; of hidden_states' dtype, or each a `QuantizedWeight` of this shape. With
    weight_layout="ekn" they are [E, H, 2I] and [E, I, H]. topk_weights: [T, k], a float dtype; topk_ids: [T, k], int32 or int64. An id outside [0, E)
    contributes nothing (expert parallelism's sentinels); a repeated id counts as often as it is there.
    activation: "silu", "gelu", "gelu_tanh", "relu2" or "swiglu_oai" (gpt-oss: alpha, up + 1). limit: gates are cut at most
    to it, up values to [-limit, limit]. b13: [E, 2I], b2: [E, H], any float dtype.
    expert_map: [global experts] int32, a global id's local expert or -1. routed_scaling_factor: multiplies topk_weights.
    weight_on_input: the weights scale the first GEMM's input (Llama-4) instead of the second's output.
    out: [T, H] in hidden_states' dtype, to write to; shares no memory with the inputs. workspace: uint8, at least
    `fused_moe_workspace_bytes` long and apart from all else, for everything in between; by default torch's allocator is asked.
    y_dtype: of the experts' weighted rows, [T * k, H], which lie in memory until they are summed in float32: float32, or
    hidden_states' dtype, in which they take half the time and memory and are rounded once more (docs/block.md). By default
    bfloat16 for bfloat16; else float32, as float16 rows may overflow although their sum would not.
    activations: "int8": the rows of both GEMMs are quantised, with a scale each, and codes multiplied with codes: up to twice as fast on many
    tokens. w13 and w2 are int8 then, [E, N, K] with one scale a row and no zeros. A block of few tokens, which weights' bytes bound, is computed
    as without it. A shared expert is not quantised. Inference only.
    config: of the two GEMMs and their gradients, instead of moe_xe's choice. autotune: as in `grouped_gemm`, for each of them.

    Differentiable in hidden_states, the weights (not quantised ones), biases, topk_weights and the shared expert; in training the shared expert
    uses torch's linear layers, if it is dense, and out and workspace are refused. recompute: backward computes the first GEMM again
    instead of keeping its output, [T * k, 2I].

    Under torch.autocast, hidden_states and, if they are dense, w13, w2 and the shared expert's projections are cast to its dtype, which the
    result then has.

    Returns out, or a new [T, H]: sums in float32, rounded once. Raises TypeError or ValueError naming the argument.
    """
    call = block_call(hidden_states, w13, w2, topk_weights, topk_ids, activation=activation, interleaved=interleaved, alpha=alpha,
                      limit=limit, b13=b13, b2=b2, expert_map=expert_map, shared=shared, routed_scaling_factor=routed_scaling_factor,
                      weight_on_input=weight_on_input, weight_layout=weight_layout, y_dtype=y_dtype, config=config,
                      autotune=autotune, activations=activations)
    checks.check_flags(recompute=recompute)
    if wants_gradient(call, BLOCK):
        if out is not None or workspace is not None:
            raise ValueError("out and workspace are for inference, but a gradient is asked for: call it under torch.no_grad()")
        if activations is not None:
            raise ValueError("activations must be None where a gradient is asked for, which codes have none for: call it under torch.no_grad()")
        return differentiable_moe(call, recompute)
    fusions = Fusions() if fusions is None else fusions      # no default value: dynamo cannot take a class's instance as one
    if not isinstance(fusions, Fusions):
        raise TypeError(f"fusions must be a Fusions, got {type(fusions).__name__}")
    arguments = BLOCK.flatten(call) + FUSIONS.flatten(fusions)
    if workspace is not None:
        _check_workspace(workspace, call)
    if out is None and workspace is None:
        return torch.ops.moe_xe.fused_moe(*arguments)
    x = call.hidden_states
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        checks.check_out(out, tuple(x.shape), x.dtype)
        checks.check_same_device(hidden_states=x, out=out)
        checks.check_no_gradient(out)
    torch.ops.moe_xe.fused_moe_out(*arguments, out, workspace)
    return out


def fused_moe_workspace_bytes(num_tokens: int, top_k: int, hidden_size: int, intermediate_size: int, num_experts: int, *,
                              dtype: torch.dtype = torch.bfloat16, shared_intermediate_size: int = 0,
                              y_dtype: torch.dtype | None = None, activations: str | None = None) -> int:
    """Bytes of a workspace that is enough for `fused_moe` on up to so many tokens.

    shared_intermediate_size: I_s of the shared expert, if there is one. y_dtype, activations: as in `fused_moe`. On the CPU device
    the kernels' own scratch still comes from torch's allocator.
    """
    checks.check_dtype("dtype", dtype)
    sizes = [checks.check_count(name, size, least, INT32_MAX) for name, size, least in (
        ("num_tokens", num_tokens, 0), ("top_k", top_k, 0), ("hidden_size", hidden_size, 0), ("intermediate_size", intermediate_size, 1),
        ("num_experts", num_experts, 0))]
    shared_size = checks.check_count("shared_intermediate_size", shared_intermediate_size, 0, INT32_MAX)
    return workspace_bytes(*sizes, dtype, shared_size, y_dtype_of(y_dtype, dtype), activations_of(activations))


def _check_workspace(workspace: torch.Tensor, call: BlockCall) -> None:
    checks.check_tensor("workspace", workspace, 1, "[bytes]")
    if workspace.dtype != torch.uint8 or not workspace.is_contiguous():
        raise TypeError(f"workspace must be a contiguous uint8 tensor, got {checks.shape_of(workspace)}")
    checks.check_same_device(hidden_states=call.hidden_states, workspace=workspace)
    num_tokens, hidden_size = call.hidden_states.shape
    shared_size = 0 if call.shared is None else call.shared.up_proj.shape[-2]
    needed = workspace_bytes(num_tokens, call.topk_ids.shape[1], hidden_size, call.w2.shape[2], call.w2.shape[0],
                             call.hidden_states.dtype, shared_size, call.y_dtype, call.activations)
    if not checks.holds(workspace.shape[0] >= needed):
        raise ValueError(f"workspace must have at least {needed} bytes (fused_moe_workspace_bytes), got {workspace.shape[0]}")


_SCHEMA = f"{BLOCK.schema}, {FUSIONS.schema}"


def _block_and_fusions(arguments) -> tuple[BlockCall, Fusions]:
    return BLOCK.unflatten(arguments[:len(BLOCK)]), FUSIONS.unflatten(arguments[len(BLOCK):])


def _fused_moe(submission, *arguments):
    call, fusions = _block_and_fusions(arguments)
    out = submission.result(*call.hidden_states.shape, dtype=call.hidden_states.dtype)
    run_block(submission, call, fusions, out, None)
    return out


def _fused_moe_out(submission, *arguments):
    *rest, out, workspace = arguments
    call, fusions = _block_and_fusions(rest)
    inputs = BLOCK.tensors(call)
    checks.check_no_overlap(out, **inputs, workspace=workspace)
    if workspace is not None:
        checks.check_no_overlap(workspace, "workspace", **inputs)
    run_block(submission, call, fusions, out, workspace)


def _no_gradient(ctx, *_):
    raise RuntimeError("moe_xe: the op fused_moe has no gradient; the function moe_xe.fused_moe has")


define("fused_moe", f"({_SCHEMA}) -> Tensor", _fused_moe, fake=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape))
define("fused_moe_out", f"({_SCHEMA}, Tensor(a!) out, Tensor(b!)? workspace) -> ()", _fused_moe_out, fake=lambda *arguments: None)
torch.library.register_autograd("moe_xe::fused_moe", _no_gradient)
