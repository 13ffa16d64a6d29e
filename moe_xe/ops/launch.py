"""From checked tensors to a launched kernel: problem, plan, compile, submit."""
from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch

from .. import runtime
from ..device import DeviceFacts, facts_of, queue_for
from ..jit import compile_kernel
from ..jit.source import grouped_gemm_source
from ..plan.choice.choice import Choice
from ..plan.gemm.config import Schedule
from ..plan.gemm.heuristics import ISA_VARIABLE, chosen_isa, has_wide_dpas
from ..plan.launch import QUEUE_WORDS, LaunchPlan, Target, plan_launch
from ..plan.model.devices import record_of
from ..plan.problem import Activation, GroupedGemmProblem, Operands, RowScale, RowsFormat
from ..quantized.weight import QuantizedWeight
from .checks import A_DTYPES, DTYPES, check_addresses, check_same_dtype, row_stride
from .submission import Submission
from .tuned import print_config, tuned_plan
from .weights import Weight, quantization_of, strides_of, tensors_of


@dataclass(frozen=True)
class SharedWeights:
    """Weights of shared experts, which lie apart from the routed ones; strides in elements. up: of pairs of halves."""
    first: torch.Tensor
    up: torch.Tensor | None
    row_stride: int
    expert_stride: int
    count: int


@dataclass(frozen=True)
class Call:
    """The checked arguments of one grouped GEMM; w is the logical [E, N, K], rows are counts, which may be a table [ranks, E], ends, or
    counts of the batched layout, whose rows are flat here (rows_format).

    row_indices: gathers rows of a (divided by slots), scatters rows of d, or both. row_scales: [total_rows] float32.
    choice: its part "forward" is for this GEMM. a_scales: [rows of a] float32, of a's int8 codes. most_rows: that one expert has, if
    that is known; it is no promise.
    """
    a: torch.Tensor
    w: Weight
    rows: torch.Tensor
    total_rows: int
    bias: torch.Tensor | None = None
    row_indices: torch.Tensor | None = None
    gathered: bool = False
    scattered: bool = False
    slots: int = 1
    row_scales: torch.Tensor | None = None
    row_scale: RowScale = RowScale.none
    activation: Activation | None = None
    shared: SharedWeights | None = None
    rows_format: str = "counts"
    schedule: str = "dynamic"
    choice: Choice = Choice()
    a_scales: torch.Tensor | None = None
    most_rows: int | None = None

    @property
    def reads(self) -> dict[str, torch.Tensor | None]:
        """What is read, by the names that users know."""
        return {"a": self.a, **tensors_of("w", self.w), rows_name(self.rows_format): self.rows, "bias": self.bias, "a_scales": self.a_scales,
                "gather_indices" if self.gathered else "scatter_indices": self.row_indices, "row_scales": self.row_scales}


def target_of(facts: DeviceFacts) -> Target:
    """What the planner needs of these facts, and of the environment. Raises ValueError for instructions that the CPU has not."""
    return _target_of(facts, os.environ.get(ISA_VARIABLE, ""))


@functools.lru_cache(maxsize=64)
def _target_of(facts: DeviceFacts, wanted_isa: str) -> Target:
    if facts.kind == "cpu":
        best = runtime.cpu_isa()
        return Target(True, facts.xe_cores, False, isa=chosen_isa(best, facts.name, wanted_isa), best_isa=best)
    dpas = has_wide_dpas(facts.has_matrix_engine, facts.sub_group_sizes)
    return Target(False, facts.xe_cores, dpas, record=record_of(facts.name, facts.xe_cores) if dpas else None)


def plan_call(call: Call, out: torch.Tensor, target: Target) -> tuple[LaunchPlan, Operands]:
    """What would be launched for this call."""
    layout, w_stride, w_expert_stride = strides_of("w", call.w)
    num_experts, n, k = call.w.shape
    shared = call.shared
    problem = GroupedGemmProblem(
        n=n, k=k, input=A_DTYPES[call.a.dtype], output=DTYPES[out.dtype], weights=layout,
        bias=None if call.bias is None else DTYPES[call.bias.dtype], rows_format=RowsFormat(call.rows_format),
        rows_bits=64 if call.rows.dtype == torch.int64 else 32, gathered=call.gathered,
        ranks=table_of(call.rows)[0], tf32=torch.get_float32_matmul_precision() != "highest", scattered=call.scattered, slots=call.slots,
        activation=call.activation, row_scale=call.row_scale, shared=0 if shared is None else shared.count,
        quantization=quantization_of(call.w))
    operands = Operands(a=call.a.data_ptr(), a_scales=pointer_of(call.a_scales) or 0, **_addresses_of(call.w), d=out.data_ptr(),
                        total_rows=call.total_rows, a_rows=call.a.shape[0], num_experts=num_experts + problem.shared, a_stride=row_stride("a", call.a),
                        w_stride=w_stride, w_expert_stride=w_expert_stride, d_stride=row_stride("out", out), d_rows=out.shape[0],
                        most_rows=call.total_rows // num_experts if call.rows_format == "batched" else call.most_rows,
                        **({} if shared is None else {
                            "shared_w": shared.first.data_ptr(), "shared_up": 0 if shared.up is None else shared.up.data_ptr(),
                            "shared_stride": shared.row_stride, "shared_expert_stride": shared.expert_stride}))
    return plan_launch(problem, operands, target, Schedule(call.schedule), call.choice.part("forward").config), operands


def _addresses_of(w: Weight) -> dict[str, int]:
    """The operands that a weight is."""
    if not isinstance(w, QuantizedWeight):
        return {"w": w.data_ptr()}
    return {"w": w.codes.data_ptr(), "scales": w.scales.data_ptr(), "zeros": pointer_of(w.zeros) or 0,
            "global_scales": pointer_of(w.global_scales) or 0}


def plan_for(call: Call, out: torch.Tensor) -> LaunchPlan:
    """The plan for this call on the device of its tensors, before any tuning."""
    return plan_call(_with_columns(call), out, target_of(facts_of(queue_for(out.device))))[0]


def rows_name(rows_format: str) -> str:
    """What users call the rows of this format."""
    return "offs" if rows_format == "ends" else "tokens_per_expert"


def _with_columns(call: Call) -> Call:
    """Without K, sums are zero and biases remain: the same with one column of zeros, as no kernel has none."""
    if call.w.shape[2]:
        return call
    dtype = torch.float32 if call.a.dtype == torch.int8 else call.a.dtype
    a, w = (call.a.new_zeros(*shape, 1, dtype=dtype) for shape in (call.a.shape[:1], call.w.shape[:2]))
    return replace(call, a=a, w=w, a_scales=None)


def table_of(rows: torch.Tensor) -> tuple[int, int]:
    """How many ranks a table of counts has, and elements between them; of plain counts, one."""
    return (rows.shape[0], rows.stride(0)) if rows.dim() == 2 else (1, 0)


def pointer_of(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(submission: Submission, call: Call, out: torch.Tensor) -> None:
    """Fills `out`."""
    if call.total_rows == 0 or out.shape[1] == 0 or call.w.shape[0] == 0:
        return
    if not isinstance(call.w, QuantizedWeight):
        check_same_dtype("w", call.w, "a", call.a)
    check_addresses(**call.reads, out=out)
    submit(submission, _with_columns(call), out, submission.zeros(QUEUE_WORDS))


def submit(submission: Submission, call: Call, out: torch.Tensor, queue_words: torch.Tensor) -> None:
    """Submits the kernel. queue_words: QUEUE_WORDS zeros."""
    queue = submission.queue
    target = target_of(facts_of(queue))
    plan, operands = plan_call(call, out, target)
    submission.keep(call, out)
    if call.choice.autotune:
        submission.cannot_be_repeated()     # the tuner may know better then

        def run(trial: LaunchPlan) -> None:
            with Submission(queue, out.device) as alone:
                _submit(alone, call, trial, operands, alone.zeros(QUEUE_WORDS))

        plan = tuned_plan(queue, "grouped_gemm", plan, operands, target, call.rows, call.rows_format, run)
    print_config("grouped_gemm", plan, operands)
    _submit(submission, call, plan, operands, queue_words)


def _submit(submission: Submission, call: Call, plan: LaunchPlan, operands: Operands, queue_words: torch.Tensor) -> None:
    kernel = compile_kernel(submission.queue, grouped_gemm_source(plan.problem, plan.config))
    scratch = submission.empty(plan.scratch_bytes(operands), dtype=torch.uint8)
    submission.launch(kernel, plan.num_groups, plan.group_size, (
        operands.a, operands.a_scales or None, operands.w or None, operands.shared_w or None, operands.shared_up or None, *operands.of_codes,
        pointer_of(call.bias), operands.d,
        call.rows.data_ptr(), pointer_of(call.row_indices), pointer_of(call.row_scales), queue_words.data_ptr(),
        scratch.data_ptr() or None, operands.total_rows, operands.a_rows, operands.d_rows, operands.a_stride, operands.w_stride,
        operands.w_expert_stride, operands.shared_stride, operands.shared_expert_stride,
        0 if call.bias is None else row_stride("bias", call.bias), operands.d_stride, table_of(call.rows)[1], operands.num_experts))
