"""Experts' MLPs on the batched layout, [E, max_rows, H], whose rows somebody else has dispatched and will sum: two launches."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan.choice.block_config import MoeConfig
from ...plan.choice.choice import Choice
from ...plan.problem import Activation
from .. import checks
from ..autocast import autocast
from ..eager import repeats
from ..gemm.batched import flat_rows
from ..gemm.grouped_gemm import validate
from ..launch import Call, launch
from ..library import define
from ..plain import takes_plain_tensors
from ..signature import Signature
from ..training_op import wants_gradient
from ..weights import Weight, logical_weights
from .call import activation_of

__all__ = ["batched_moe"]


@dataclass(frozen=True)
class BatchedCall:
    """The checked arguments: hidden_states [E * max_rows, H], w13 the logical [E, 2I or I, H], w2 the logical [E, H, I]."""
    hidden_states: torch.Tensor
    w13: Weight
    w2: Weight
    tokens_per_expert: torch.Tensor
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    activation: Activation
    choice: Choice


BATCHED = Signature(BatchedCall)


@repeats
@takes_plain_tensors
def batched_moe(hidden_states: torch.Tensor, w13: Weight, w2: Weight, tokens_per_expert: torch.Tensor, *, activation: str = "silu",
                interleaved: bool = False, alpha: float = 1.702, limit: float | None = None, b13: torch.Tensor | None = None,
                b2: torch.Tensor | None = None, weight_layout: str = "enk", out: torch.Tensor | None = None,
                config: MoeConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """``down(act(gate_up(row)))`` of each expert's rows, unweighted.

    hidden_states: [E, max_rows, H], of which expert e has the first tokens_per_expert[e] rows; the others are not read.
    tokens_per_expert: [E] int32 or int64. out: [E, max_rows, H] in hidden_states' dtype, to write to; shares no memory with the inputs.
    The others: as in `fused_moe`. For inference: in training, `grouped_gemm` takes the same rows.

    Returns out, or a new [E, max_rows, H], whose other rows are left as they are; in a new one they are anything. Raises TypeError or
    ValueError naming the argument.
    """
    hidden_states, w13, w2 = autocast(hidden_states, w13, w2)
    checks.check_tensor("hidden_states", hidden_states, 3, "[E, max_rows, H]")
    for name, w in (("w13", w13), ("w2", w2)):
        checks.check_weight_type(name, w)
    w13, w2 = (logical_weights(w, weight_layout, name) for name, w in (("w13", w13), ("w2", w2)))
    first = validate(hidden_states, w13, tokens_per_expert, b13, None, None, None, "dynamic", rows_dtypes=(torch.int32, torch.int64),
                     a_name="hidden_states", w_name="w13", bias_name="b13")
    num_experts, n13, hidden_size = w13.shape
    size = w2.shape[2]
    if w2.shape[:2] != (num_experts, hidden_size) or n13 not in (size, 2 * size) or size == 0:
        raise ValueError(f"w13 [E, 2I or I, H] and w2 [E, H, I] must fit together and not be empty, got (as [E, N, K]) "
                         f"{list(w13.shape)} and {list(w2.shape)}")
    validate(hidden_states.new_empty(0, size), w2, tokens_per_expert, b2, None, hidden_states.dtype, None, "dynamic",
             rows_dtypes=(torch.int32, torch.int64), a_name="hidden_states", w_name="w2", bias_name="b2")
    call = BatchedCall(first.a, w13, w2, tokens_per_expert, b13, b2, activation_of(activation, n13 == 2 * size, interleaved, alpha, limit),
                       Choice.of(config, autotune, MoeConfig))
    if wants_gradient(call, BATCHED):
        raise ValueError("batched_moe is for inference, but a gradient is asked for: call it under torch.no_grad(), or use grouped_gemm")
    if out is None:
        return torch.ops.moe_xe.batched_moe(*BATCHED.flatten(call)).view(hidden_states.shape)
    flat = flat_rows("out", out, *hidden_states.shape[:2], "[E, max_rows, H]")
    checks.check_out(flat, tuple(call.hidden_states.shape), hidden_states.dtype)
    checks.check_same_device(hidden_states=hidden_states, out=out)
    checks.check_no_gradient(out)
    torch.ops.moe_xe.batched_moe_out(*BATCHED.flatten(call), flat)
    return out


def _run(submission, call: BatchedCall, out: torch.Tensor) -> None:
    x, rows = call.hidden_states, call.tokens_per_expert
    h = submission.empty(len(x), call.w2.shape[2], dtype=x.dtype)
    launch(submission, Call(x, call.w13, rows, len(x), call.b13, activation=call.activation, rows_format="batched",
                            choice=call.choice.part("gate_up")), h)
    launch(submission, Call(h, call.w2, rows, len(x), call.b2, rows_format="batched", choice=call.choice.part("down")), out)


def _batched_moe(submission, *arguments):
    call = BATCHED.unflatten(arguments)
    out = submission.result(*call.hidden_states.shape, dtype=call.hidden_states.dtype)
    _run(submission, call, out)
    return out


def _batched_moe_out(submission, *arguments):
    *inputs, out = arguments
    call = BATCHED.unflatten(inputs)
    checks.check_no_overlap(out, **BATCHED.tensors(call))
    _run(submission, call, out)


define("batched_moe", f"({BATCHED.schema}) -> Tensor", _batched_moe, fake=lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape))
define("batched_moe_out", f"({BATCHED.schema}, Tensor(a!) out) -> ()", _batched_moe_out, fake=lambda *arguments: None)
