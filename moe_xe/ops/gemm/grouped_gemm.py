"""The MoE grouped GEMM: ``out[rows of e] = a[rows of e] @ w[e]^T (+ bias[e])`` for all experts in one launch."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan.choice.block_config import GemmConfigs
from ...plan.choice.choice import Choice
from ...plan.gemm.config import TileConfig
from ...plan.launch import LaunchPlan
from ...plan.problem import INT32_MAX, RowScale
from .. import checks
from ..autocast import autocast
from ..eager import repeats
from ..launch import Call, launch, plan_for
from ..library import define
from ..plain import takes_plain_tensors
from ..signature import Signature
from ..weights import Weight, check_int8_weight, check_weight, logical_weights, tensors_of
from .batched import flat_rows, is_batched

__all__ = ["explain", "grouped_gemm"]


@repeats
@takes_plain_tensors
def grouped_gemm(a: torch.Tensor, w: Weight, tokens_per_expert: torch.Tensor, *, bias: torch.Tensor | None = None,
                 gather_indices: torch.Tensor | None = None, gather_divisor: int = 1,
                 scatter_indices: torch.Tensor | None = None, row_scales: torch.Tensor | None = None,
                 a_scales: torch.Tensor | None = None, weight_layout: str = "enk", out_dtype: torch.dtype | None = None,
                 out: torch.Tensor | None = None, schedule: str = "dynamic", config: TileConfig | GemmConfigs | None = None,
                 autotune: bool = False, check: bool = False) -> torch.Tensor:
    """Multiplies each expert's rows with its weights, in one persistent kernel and without host synchronisation.

    a: [total_rows, K], sorted by expert; bfloat16, float16 or float32. With `gather_indices`, [tokens, K]. K = 0: sums are zero.
      Or [E, max_rows, K], of which expert e has the first tokens_per_expert[e] rows of a[e]: the batched layout. So have then the
      result, `out` ([E, max_rows, N]) and row_scales ([E, max_rows]); gather_indices and scatter_indices are left out.
    w: [E, N, K] (``weight_layout="enk"``) or [E, K, N] (``"ekn"``), a's dtype. Either of the last two dimensions may be
      the contiguous one: a transposed view is read in place. Or a `QuantizedWeight` of this shape, for any dtype of a.
    tokens_per_expert: [E] int32 or int64 on a's device. Rows beyond their sum are left as they are: in a new result they are
      anything. Or a table [ranks, E], as an all-to-all leaves rows: sorted by rank and, within a rank, by expert. They are read and
      written where they are; a table's rows may lie apart. Not of the batched layout.
    bias: [E, N], bfloat16, float16 or float32, added in float32.
    gather_indices: [total_rows] int32, row r of the sorted rows is ``a[gather_indices[r] // gather_divisor]``. An index outside
      reads a's last row, which then has the gradient. Indices of rows beyond the counts are not looked at.
    scatter_indices: [total_rows] int32, row r of the sorted rows is written to row scatter_indices[r] of the result, which
      has total_rows rows; an index outside is not written, and what it was made of has no gradient. Excludes gather_indices.
    row_scales: [total_rows] float32, multiplies row r of the sorted rows, bias included, before it is rounded.
    a_scales: [rows of a] float32, where a is int8 codes (`quantize_rows`): then w is an int8 `QuantizedWeight` [E, N, K] with one scale a
      row and without zeros, and K is at most 65536; sums of products of codes are scaled once. Without gradients.
    out_dtype: bfloat16, float16 or float32; a's dtype by default, of int8 codes bfloat16. Accumulation is in float32; float32 inputs are exact
      unless torch.set_float32_matmul_precision allows tf32 and the device has it.
    out: [total_rows, N] to write to; shares no memory with the inputs. Not where a gradient is asked for.
    schedule: "dynamic" (work-groups fetch tiles) or "static" (each takes every n-th); a config has its own.
    config: instead of moe_xe's choice (docs/choosing.md): a TileConfig, or GemmConfigs for the gradients' GEMMs, too.
    autotune: take the fastest of a few configurations, which the first call of a kind measures; the choice is kept on disk.
    check: also check, on the host, what only the device knows: the counts' signs and sum, the indices' range.

    Differentiable, any number of times, in a, w (not a quantised one), bias and row_scales. Under torch.autocast a and w are cast to its
    dtype.

    Returns out, or a new [total_rows, N]. Raises TypeError or ValueError naming the argument.
    """
    a, w = autocast(a, w)
    call = validate(a, logical_weights(w, weight_layout), tokens_per_expert, bias, gather_indices, out_dtype, out, schedule,
                    rows_dtypes=(torch.int32, torch.int64), gather_divisor=gather_divisor, scatter_indices=scatter_indices,
                    row_scales=row_scales, a_scales=a_scales, choice=Choice.of(config, autotune, TileConfig, GemmConfigs))
    checks.check_flags(check=check)
    if check:
        checks.check_row_counts(tokens_per_expert, call.total_rows, "tokens_per_expert", batched=is_batched(a))
        if gather_indices is not None:
            checks.check_index_values("gather_indices", gather_indices, a.shape[0] * gather_divisor)
        if scatter_indices is not None:
            checks.check_index_values("scatter_indices", scatter_indices, call.total_rows)
    if not is_batched(a):
        return dispatch(call, out_dtype, out)
    shape = *a.shape[:2], call.w.shape[1]
    result = dispatch(call, out_dtype, None if out is None else out.view(call.total_rows, shape[2]))
    return result.view(shape) if out is None else out


def explain(a: torch.Tensor, w: Weight, tokens_per_expert: torch.Tensor, *, bias: torch.Tensor | None = None,
            gather_indices: torch.Tensor | None = None, gather_divisor: int = 1, scatter_indices: torch.Tensor | None = None,
            row_scales: torch.Tensor | None = None, a_scales: torch.Tensor | None = None, weight_layout: str = "enk",
            out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None, schedule: str = "dynamic",
            config: TileConfig | GemmConfigs | None = None) -> LaunchPlan:
    """What `grouped_gemm` would launch for these arguments, untuned: problem, configuration, work-groups. Raises as it does."""
    a, w = autocast(a, w)
    call = validate(a, logical_weights(w, weight_layout), tokens_per_expert, bias, gather_indices, out_dtype, out, schedule,
                    rows_dtypes=(torch.int32, torch.int64), gather_divisor=gather_divisor, scatter_indices=scatter_indices,
                    row_scales=row_scales, a_scales=a_scales, choice=Choice.of(config, False, TileConfig, GemmConfigs))
    if out is None:
        out = torch.empty(call.total_rows, call.w.shape[1], dtype=out_dtype or default_out_dtype(a), device=a.device)
    return plan_for(call, out.view(call.total_rows, call.w.shape[1]))


def validate(a, w, rows, bias, gather_indices, out_dtype, out, schedule, *, rows_dtypes, rows_name="tokens_per_expert",
             a_name="a", w_name="w", bias_name="bias", rows_format="counts", gather_divisor=1, scatter_indices=None, row_scales=None,
             a_scales=None, choice=Choice()) -> Call:
    """Checks all that can be known without the device; w is the logical [E, N, K]. The names are the user's; rows of the batched layout
    are flat in the Call."""
    if is_batched(a) and rows_format == "counts":
        a, row_scales, a_scales, out = _flat(a_name, a, rows_name, rows, gather_indices, scatter_indices, row_scales, a_scales, out)
        rows_format = "batched"
    checks.check_tensor(a_name, a, 2, "[total_rows, K]")
    if a_scales is None:
        check_weight(w_name, w, a_name, a)
    else:
        _check_codes(a_name, a, w_name, w, a_scales, bias, row_scales)
    num_experts, n, k = w.shape
    if not checks.holds(a.shape[1] == k):
        raise ValueError(f"{a_name} and {w_name} must agree in K: {a_name} is {checks.shape_of(a)} (K = {a.shape[1]}), "
                         f"{w_name} has K = {k} and N = {n}")
    checks.check_counts(rows_name, rows, num_experts, rows_dtypes, table=rows_format == "counts")
    if bias is not None:
        checks.check_tensor(bias_name, bias, 2, "[E, N]")
        checks.check_dtype(bias_name, bias.dtype)
        if not checks.has_shape(bias, (num_experts, n)):
            raise ValueError(f"{bias_name} must be [E, N] = [{num_experts}, {n}], got {list(bias.shape)}")
        checks.row_stride(bias_name, bias)
    if gather_indices is not None:
        checks.check_indices("gather_indices", gather_indices, None, "total_rows", (torch.int32,))
        if not checks.holds(torch.sym_min(gather_indices.shape[0], 1) <= a.shape[0]):
            raise ValueError(f"{a_name} has no rows, but gather_indices asks for {gather_indices.shape[0]}")
        if scatter_indices is not None:
            raise ValueError("gather_indices and scatter_indices exclude each other, got both")
    gather_divisor = checks.check_count("gather_divisor", gather_divisor, 1, INT32_MAX)
    total_rows = _total_rows(a, gather_indices)
    if scatter_indices is not None:
        checks.check_indices("scatter_indices", scatter_indices, total_rows, "total_rows", (torch.int32,))
    if row_scales is not None:
        checks.check_indices("row_scales", row_scales, total_rows, "total_rows", (torch.float32,))
    if out is not None:
        checks.check_tensor("out", out, 2, "[total_rows, N]")
    out_dtype = out_dtype or (default_out_dtype(a) if out is None else out.dtype)
    checks.check_dtype("out_dtype", out_dtype)
    if schedule not in ("dynamic", "static"):
        raise ValueError(f'schedule must be "dynamic" or "static", got {schedule!r}')
    if schedule != "dynamic" and choice.config is not None:
        raise ValueError(f"schedule must be left out where a config is given, which has its own; got {schedule!r}")
    checks.check_same_device(**{a_name: a, **tensors_of(w_name, w), rows_name: rows, bias_name: bias}, gather_indices=gather_indices,
                             scatter_indices=scatter_indices, row_scales=row_scales, a_scales=a_scales, out=out)
    checks.row_stride(a_name, a)
    if not checks.holds(total_rows < 2**31):
        raise ValueError(f"total_rows must be below 2^31, got {total_rows}")
    if out is not None:
        checks.check_out(out, (total_rows, n), out_dtype)
        checks.check_no_gradient(out, **{a_name: a, **tensors_of(w_name, w)}, bias=bias, row_scales=row_scales)
    return _call(Inputs(a, w, rows, bias, gather_indices, scatter_indices, row_scales, gather_divisor, a_scales), rows_format, schedule, choice)


def default_out_dtype(a: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if a.dtype == torch.int8 else a.dtype


def _check_codes(a_name: str, a, w_name: str, w, a_scales, bias, row_scales) -> None:
    """Of a product of codes."""
    if a.dtype != torch.int8:
        raise TypeError(f"{a_name} must be int8 with a_scales, got {a.dtype}")
    checks.check_indices("a_scales", a_scales, a.shape[0], f"rows of {a_name}", (torch.float32,))
    check_int8_weight(w_name, w, f"{a_name} in int8")
    for name, tensor in (("bias", bias), ("row_scales", row_scales), ("a_scales", a_scales)):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, which products of codes have none for: call it under torch.no_grad()")


def _flat(a_name, a, rows_name, rows, gather_indices, scatter_indices, row_scales, a_scales, out) -> tuple[torch.Tensor | None, ...]:
    """a, row_scales, a_scales and out of the batched layout."""
    for name, indices in (("gather_indices", gather_indices), ("scatter_indices", scatter_indices)):
        if indices is not None:
            raise ValueError(f"{name} must be left out where {a_name} is [E, max_rows, K], got {type(indices).__name__}")
    checks.check_tensor(rows_name, rows, 1, f"[experts] where {a_name} is [E, max_rows, K]")
    room = rows.shape[0], a.shape[1]
    return (flat_rows(a_name, a, *room, "[E, max_rows, K]"),
            *(None if scales is None else flat_rows(name, scales, *room, "[E, max_rows]")
              for name, scales in (("row_scales", row_scales), ("a_scales", a_scales))),
            None if out is None else flat_rows("out", out, *room, "[E, max_rows, N]"))


def dispatch(call: Call, out_dtype: torch.dtype | None, out: torch.Tensor | None, zeros: bool = False) -> torch.Tensor:
    """zeros: rows of a new result that are not computed are zero, else anything."""
    gather, scatter = (call.row_indices, None) if call.gathered else (None, call.row_indices)
    inputs = Inputs(call.a, call.w, call.rows, call.bias, gather, scatter, call.row_scales, call.slots, call.a_scales)
    arguments, options = INPUTS.flatten(inputs), (call.rows_format, call.schedule, call.choice.text)
    if out is None:
        return torch.ops.moe_xe.grouped_gemm(*arguments, out_dtype or default_out_dtype(call.a), *options, zeros)
    torch.ops.moe_xe.grouped_gemm_out(*arguments, out, *options)
    return out


@dataclass(frozen=True)
class Inputs:
    """What a product is computed from."""
    a: torch.Tensor
    w: Weight
    rows: torch.Tensor
    bias: torch.Tensor | None = None
    gather_indices: torch.Tensor | None = None
    scatter_indices: torch.Tensor | None = None
    row_scales: torch.Tensor | None = None
    gather_divisor: int = 1
    a_scales: torch.Tensor | None = None


INPUTS = Signature(Inputs)


def _total_rows(a, gather_indices):
    return a.shape[0] if gather_indices is None else gather_indices.shape[0]


def _call(inputs: Inputs, rows_format: str, schedule: str, choice: Choice) -> Call:
    gather, scatter = inputs.gather_indices, inputs.scatter_indices
    return Call(inputs.a, inputs.w, inputs.rows, _total_rows(inputs.a, gather), inputs.bias, scatter if gather is None else gather,
                gathered=gather is not None, scattered=scatter is not None, slots=inputs.gather_divisor, row_scales=inputs.row_scales,
                row_scale=RowScale.none if inputs.row_scales is None else RowScale.outputs, rows_format=rows_format, schedule=schedule,
                choice=choice, a_scales=inputs.a_scales)


def _grouped_gemm_out(submission, *arguments):
    *inputs, out, rows_format, schedule, choice = arguments
    call = _call(INPUTS.unflatten(inputs), rows_format, schedule, Choice.parse(choice))
    checks.check_no_overlap(out, **call.reads)
    launch(submission, call, out)


def _grouped_gemm(submission, *arguments):
    inputs, (out_dtype, rows_format, schedule, choice, zeros) = _inputs_and_options(arguments)
    call = _call(inputs, rows_format, schedule, Choice.parse(choice))
    out = submission.result(call.total_rows, call.w.shape[1], dtype=out_dtype, zeros=zeros)
    launch(submission, call, out)
    return out


def _inputs_and_options(arguments: tuple) -> tuple[Inputs, tuple]:
    return INPUTS.unflatten(arguments[:len(INPUTS)]), arguments[len(INPUTS):]


def _fake(*arguments):
    inputs, (out_dtype, *_) = _inputs_and_options(arguments)
    return inputs.a.new_empty(_total_rows(inputs.a, inputs.gather_indices), inputs.w.shape[1], dtype=out_dtype)


define("grouped_gemm_out", f"({INPUTS.schema}, Tensor(a!) out, str rows_format, str schedule, str choice) -> ()", _grouped_gemm_out,
       fake=lambda *arguments: None)
define("grouped_gemm", f"({INPUTS.schema}, ScalarType out_dtype, str rows_format, str schedule, str choice, bool zeros) -> Tensor",
       _grouped_gemm, fake=_fake)
