"""The weights' gradient of a grouped GEMM: ``out[e] = left[rows of e]^T @ right[rows of e]`` for all experts in one launch."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...device import facts_of
from ...jit import compile_kernel
from ...jit.outer_source import grouped_outer_source
from ...plan.choice.choice import Choice
from ...plan.launch import QUEUE_WORDS, LaunchPlan, Target, plan_outer
from ...plan.outer.config import Gathered, OuterConfig, OuterOperands, OuterProblem, OuterXeConfig
from ...plan.problem import INT32_MAX, Dtype, RowsFormat, WeightLayout
from .. import checks
from ..autocast import autocast
from ..checks import DTYPES, row_stride
from ..eager import repeats
from ..launch import pointer_of, rows_name, table_of, target_of
from ..library import define
from ..plain import takes_plain_tensors
from ..routing.token_sort import Routing, launch_combine
from ..submission import Submission
from ..tuned import print_config, tuned_plan
from .batched import flat_rows, is_batched

__all__ = ["grouped_outer", "outer_product", "source_rows", "weights_gradient", "with_zero_row"]


@dataclass(frozen=True)
class OuterCall:
    """The checked arguments of one call; rows as in launch.Call."""
    left: torch.Tensor
    right: torch.Tensor
    rows: torch.Tensor
    gather_indices_left: torch.Tensor | None = None
    gather_indices_right: torch.Tensor | None = None
    gather_divisor: int = 1
    rows_format: str = "counts"
    choice: Choice = Choice()

    @property
    def row_indices(self) -> torch.Tensor | None:
        return self.gather_indices_right if self.gather_indices_left is None else self.gather_indices_left

    @property
    def gathered(self) -> Gathered:
        if self.gather_indices_left is not None:
            return Gathered.left
        return Gathered.none if self.gather_indices_right is None else Gathered.right

    @property
    def total_rows(self) -> int:
        return (self.left if self.row_indices is None else self.row_indices).shape[0]

    @property
    def reads(self) -> dict[str, torch.Tensor | None]:
        """What is read, by the names that users know."""
        return {"left": self.left, "right": self.right, rows_name(self.rows_format): self.rows,
                "gather_indices_left": self.gather_indices_left, "gather_indices_right": self.gather_indices_right}

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return self.rows.shape[-1], self.left.shape[1], self.right.shape[1]


@repeats
@takes_plain_tensors
def grouped_outer(left: torch.Tensor, right: torch.Tensor, tokens_per_expert: torch.Tensor, *,
                  gather_indices_left: torch.Tensor | None = None, gather_indices_right: torch.Tensor | None = None,
                  gather_divisor: int = 1, out_dtype: torch.dtype | None = None, out: torch.Tensor | None = None,
                  accumulate: bool = False, config: OuterConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """Multiplies each expert's rows of two matrices with each other, in one persistent kernel and without host synchronisation.

    left: [total_rows, P], sorted by expert; bfloat16, float16 or float32. With `gather_indices_left`, [tokens, P].
    right: [total_rows, Q], left's dtype. With `gather_indices_right`, [tokens, Q].
      Both may be of the batched layout, [E, max_rows, P] and [E, max_rows, Q], as in `grouped_gemm`; then nothing is gathered.
    tokens_per_expert: [E] int32 or int64 on left's device. Rows beyond their sum are not used. Or a table [ranks, E], as in
      `grouped_gemm`: an expert's rows of all ranks are summed, in order.
    gather_indices_left, gather_indices_right: [total_rows] int32, row r of that operand's sorted rows is
      ``operand[indices[r] // gather_divisor]``; an index outside reads its last row. They exclude each other.
    out_dtype: bfloat16, float16 or float32; left's dtype by default. Accumulation is in float32, and float32 inputs are
      multiplied as they are.
    out: [E, P, Q] to write to, a view with contiguous rows that do not overlap; shares no memory with the inputs. Not where
      a gradient is asked for.
    accumulate: add to `out` instead of overwriting it, rounding once.
    config, autotune: as in `grouped_gemm`.

    The gradient of ``w`` in ``d = grouped_gemm(a, w, ...)`` is ``grouped_outer(grad_d, a, ...)`` for [E, N, K] weights, and
    ``grouped_outer(a, grad_d, ...)`` for [E, K, N] ones. An expert without rows has zeros.
    Differentiable, any number of times, in left and right. Under torch.autocast both are cast to its dtype.

    Returns out, or a new [E, P, Q]. Raises TypeError or ValueError naming the argument.
    """
    left, right = autocast(left, right)
    rows_format = "counts"
    if is_batched(left) or is_batched(right):
        left, right = _flat(left, right, tokens_per_expert, gather_indices_left, gather_indices_right)
        rows_format = "batched"
    call = OuterCall(left, right, tokens_per_expert, gather_indices_left, gather_indices_right, gather_divisor,
                     rows_format, Choice.of(config, autotune, OuterConfig))
    checks.check_flags(accumulate=accumulate)
    validate(call, out_dtype, out, accumulate)
    return dispatch(call, out_dtype, out, accumulate)


def _flat(left, right, rows, *gathers) -> tuple[torch.Tensor, torch.Tensor]:
    """left and right of the batched layout."""
    for name, indices in zip(("gather_indices_left", "gather_indices_right"), gathers):
        if indices is not None:
            raise ValueError(f"{name} must be left out where rows are [E, max_rows, ..], got {type(indices).__name__}")
    checks.check_tensor("tokens_per_expert", rows, 1, "[experts] where rows are [E, max_rows, ..]")
    checks.check_tensor("left", left, 3, "[E, max_rows, P]")
    room = rows.shape[0], left.shape[1]
    return flat_rows("left", left, *room, "[E, max_rows, P]"), flat_rows("right", right, *room, "[E, max_rows, Q]")


def weights_gradient(w: torch.Tensor, grad_rows: torch.Tensor, input_rows: torch.Tensor, rows: torch.Tensor,
                     grad_indices: torch.Tensor | None, input_indices: torch.Tensor | None, gather_divisor: int,
                     rows_format: str = "counts", choice: Choice = Choice()) -> torch.Tensor:
    """The gradient of logical [E, N, K] weights, in their memory layout and dtype.

    grad_rows, input_rows: the rows of a grouped GEMM's result and of its input, sorted by expert; one of them may be
    gathered, as in `grouped_outer`.
    """
    swapped = checks.weight_layout("w", w)[0] is WeightLayout.ekn
    left, right, left_indices, right_indices = grad_rows, input_rows, grad_indices, input_indices
    if swapped:
        left, right, left_indices, right_indices = right, left, right_indices, left_indices
    product = outer_product(OuterCall(left, right, rows, left_indices, right_indices, gather_divisor, rows_format, choice), w.dtype)
    return product.transpose(1, 2) if swapped else product


def outer_product(call: OuterCall, out_dtype: torch.dtype) -> torch.Tensor:
    """A new [E, P, Q], of arguments that are checked as a user's are."""
    validate(call, out_dtype, None, False)
    return dispatch(call, out_dtype, None, False)


def source_rows(indices: torch.Tensor, divisor: int, num_rows: int) -> torch.Tensor:
    """The row of an operand, int64, that each gather index reads. Whatever an index says, it is one: outside, the last."""
    unsigned = indices.long() & 0xFFFFFFFF      # as kernels read it: a negative one is a large one
    return (unsigned // divisor).clamp(max=num_rows - 1)


def with_zero_row(grad: torch.Tensor) -> torch.Tensor:
    """For the gradient of scattered rows, which gathers: an index outside, whose row was not written, reads the last row."""
    return torch.nn.functional.pad(grad, (0, 0, 0, 1))


def validate(call: OuterCall, out_dtype, out, accumulate, *, rows_dtypes=(torch.int32, torch.int64), left_name="left",
             right_name="right", rows_name="tokens_per_expert") -> None:
    """Checks all that can be known without the device. The names are the user's."""
    left, right, rows = call.left, call.right, call.rows
    checks.check_tensor(left_name, left, 2, "[total_rows, P]")
    checks.check_tensor(right_name, right, 2, "[total_rows, Q]")
    checks.check_dtype(left_name, left.dtype)
    checks.check_same_dtype(right_name, right, left_name, left)
    checks.check_counts(rows_name, rows, None, rows_dtypes, table=call.rows_format == "counts")
    gathers = {"gather_indices_left": call.gather_indices_left, "gather_indices_right": call.gather_indices_right}
    for name, indices in gathers.items():
        if indices is not None:
            checks.check_indices(name, indices, None, "total_rows", (torch.int32,))
    if call.gather_indices_left is not None and call.gather_indices_right is not None:
        raise ValueError("gather_indices_left and gather_indices_right exclude each other, got both")
    for side, operand, indices in ((left_name, left, call.gather_indices_left), (right_name, right, call.gather_indices_right)):
        if indices is not None:
            if not checks.holds(torch.sym_min(indices.shape[0], 1) <= operand.shape[0]):
                raise ValueError(f"{side} has no rows, but gather_indices_{side} asks for {indices.shape[0]}")
        elif not checks.holds(operand.shape[0] == call.total_rows):
            other = "gather_indices" if call.row_indices is not None else left_name
            raise ValueError(f"{side} must have as many rows as {other}, {call.total_rows}, got {checks.shape_of(operand)}")
    checks.check_count("gather_divisor", call.gather_divisor, 1, INT32_MAX)
    if out is not None:
        checks.check_tensor("out", out, 3, "[E, P, Q]")
    checks.check_same_device(**{left_name: left, right_name: right, rows_name: rows}, **gathers, out=out)
    row_stride(left_name, left)
    row_stride(right_name, right)
    if not checks.holds(call.total_rows < 2**31):
        raise ValueError(f"total_rows must be below 2^31, got {call.total_rows}")
    out_dtype = out_dtype or (left.dtype if out is None else out.dtype)
    checks.check_dtype("out_dtype", out_dtype)
    if out is not None:
        _check_out(out, call.out_shape, out_dtype)
        checks.check_no_gradient(out, **{left_name: left, right_name: right})
    elif accumulate:
        raise ValueError("accumulate adds to out, which must be given")


def _check_out(out, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if not checks.has_shape(out, shape) or out.dtype != dtype:
        raise ValueError(f"out must be {str(dtype).removeprefix('torch.')}{list(shape)}, got {checks.shape_of(out)}")
    if shape[2] > 1 and out.stride(2) != 1:
        raise ValueError(f"out's rows must be contiguous (stride(2) == 1), got strides {tuple(out.stride())}; "
                         f"for a transposed out, swap left and right")
    extent = shape[2]     # of what lies between two neighbours in memory, smallest stride first
    for stride, size in sorted((out.stride(dim), shape[dim]) for dim in (0, 1) if shape[dim] > 1):
        if stride < extent:
            raise ValueError(f"out's rows must not overlap, got {checks.shape_of(out)} with strides {tuple(out.stride())}")
        extent += stride * (size - 1)


def dispatch(call: OuterCall, out_dtype: torch.dtype | None, out: torch.Tensor | None, accumulate: bool) -> torch.Tensor:
    arguments = (call.left, call.right, call.rows, call.gather_indices_left, call.gather_indices_right, call.gather_divisor,
                 call.rows_format, call.choice.text)
    if out is None:
        return torch.ops.moe_xe.grouped_outer(*arguments, out_dtype or call.left.dtype)
    torch.ops.moe_xe.grouped_outer_out(*arguments, out, accumulate)
    return out


Plan = LaunchPlan[OuterProblem, OuterConfig]


def plan(call: OuterCall, out: torch.Tensor, accumulate: bool, target: Target) -> tuple[Plan, OuterOperands]:
    """What would be launched for this call, untuned."""
    num_experts, p, q = call.out_shape
    problem = OuterProblem(
        p=p, q=q, input=DTYPES[call.left.dtype], output=DTYPES[out.dtype], rows_format=RowsFormat(call.rows_format),
        rows_bits=64 if call.rows.dtype == torch.int64 else 32, gathered=call.gathered, slots=call.gather_divisor,
        accumulate=accumulate, ranks=table_of(call.rows)[0])
    d_stride = out.stride(1) if p > 1 else q
    operands = OuterOperands(
        left=call.left.data_ptr(), right=call.right.data_ptr(), d=out.data_ptr(), total_rows=call.total_rows,
        left_rows=call.left.shape[0], right_rows=call.right.shape[0], num_experts=num_experts,
        left_stride=row_stride("left", call.left), right_stride=row_stride("right", call.right),
        d_stride=d_stride, d_expert_stride=out.stride(0) if num_experts > 1 else p * d_stride)
    return plan_outer(problem, operands, target, call.choice.config), operands


def launch(submission: Submission, call: OuterCall, out: torch.Tensor, accumulate: bool = False) -> None:
    """Fills `out`."""
    if out.numel() == 0:
        return
    if call.total_rows == 0:
        submission.cannot_be_repeated()
        if not accumulate:
            out.zero_()
        return
    checks.check_same_dtype("right", call.right, "left", call.left)
    checks.check_addresses(**call.reads, out=out)
    queue = submission.queue
    target = target_of(facts_of(queue))
    planned, operands = plan(call, out, accumulate, target)
    if call.choice.autotune:
        submission.cannot_be_repeated()     # the tuner may know better then
        # what is added to must not be added to twice
        trial_out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device) if accumulate else out
        trial_operands = replace(operands, d=trial_out.data_ptr())

        def run(trial: Plan) -> None:
            with Submission(queue, out.device) as alone:
                submit(alone, call, trial, trial_operands, trial_out)

        planned = tuned_plan(queue, "grouped_outer", planned, operands, target, call.rows, call.rows_format, run)
    print_config("grouped_outer", planned, operands)
    submit(submission, call, planned, operands, out)


def submit(submission: Submission, call: OuterCall, planned: Plan, operands: OuterOperands, out: torch.Tensor) -> None:
    """Submits the kernels."""
    if planned.config.splits == 1:
        _submit_product(submission, call, planned, operands, 0)
    else:
        _submit_parts(submission, call, planned, operands, out)


def _submit_product(submission: Submission, call: OuterCall, planned: Plan, operands: OuterOperands, d_split_stride: int) -> None:
    kernel = compile_kernel(submission.queue, grouped_outer_source(planned.problem, planned.config))
    queue_words = submission.zeros(QUEUE_WORDS)
    scratch = submission.empty(planned.scratch_bytes(operands), dtype=torch.uint8)
    addresses = row_addresses(call) if isinstance(planned.config, OuterXeConfig) else None
    submission.keep(addresses)
    submission.launch(kernel, planned.num_groups, planned.group_size, (
        operands.left, operands.right, operands.d, call.rows.data_ptr(), pointer_of(call.row_indices), pointer_of(addresses),
        queue_words.data_ptr(), scratch.data_ptr() or None, operands.total_rows, operands.left_rows, operands.right_rows,
        operands.left_stride, operands.right_stride, operands.d_stride, operands.d_expert_stride, d_split_stride, table_of(call.rows)[1],
        operands.num_experts))


def row_addresses(call: OuterCall) -> torch.Tensor | None:
    """[total_rows] int64, where the rows of the gathered operand lie."""
    if call.row_indices is None:
        return None
    operand = call.left if call.gathered is Gathered.left else call.right
    source = source_rows(call.row_indices, call.gather_divisor, operand.shape[0])
    return source.mul_(row_stride("operand", operand) * operand.element_size()).add_(operand.data_ptr())


def _submit_parts(submission: Submission, call: OuterCall, planned: Plan, operands: OuterOperands, out: torch.Tensor) -> None:
    """For tiles that share an expert's rows out: their parts of d, then the parts' sums, in order."""
    num_experts, p, q = out.shape
    splits, aligned_q = planned.config.splits, -(-q // 16) * 16     # 64 bytes, which block messages ask for
    parts = submission.empty(num_experts, p, splits, aligned_q, dtype=torch.float32)
    to_parts = replace(operands, d=parts.data_ptr(), d_stride=parts.stride(1), d_expert_stride=parts.stride(0))
    in_float = replace(planned, problem=replace(planned.problem, output=Dtype.f32))
    _submit_product(submission, call, in_float, to_parts, parts.stride(2))
    no_ids = torch.empty(num_experts * p, 0, dtype=torch.int32, device=out.device)
    launch_combine(submission, Routing(no_ids, 0, num_shared=splits), parts.view(-1, aligned_q), out.view(num_experts * p, q))


_ARGUMENTS = ("Tensor left, Tensor right, Tensor rows, Tensor? gather_indices_left, Tensor? gather_indices_right, "
              "int gather_divisor, str rows_format, str choice")


def _grouped_outer_out(submission, *arguments):
    *inputs, choice, out, accumulate = arguments
    call = OuterCall(*inputs, Choice.parse(choice))
    checks.check_no_overlap(out, **call.reads)
    launch(submission, call, out, accumulate)


def _grouped_outer(submission, *arguments):
    *inputs, choice, out_dtype = arguments
    call = OuterCall(*inputs, Choice.parse(choice))
    out = submission.result(*call.out_shape, dtype=out_dtype)
    launch(submission, call, out)
    return out


def _fake(left, right, rows, gather_indices_left, gather_indices_right, gather_divisor, rows_format, choice, out_dtype):
    return left.new_empty(rows.shape[-1], left.shape[1], right.shape[1], dtype=out_dtype)


define("grouped_outer_out", f"({_ARGUMENTS}, Tensor(a!) out, bool accumulate) -> ()", _grouped_outer_out,
       fake=lambda *arguments: None)
define("grouped_outer", f"({_ARGUMENTS}, ScalarType out_dtype) -> Tensor", _grouped_outer, fake=_fake)
