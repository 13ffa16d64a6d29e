"""From checked tensors to a launched kernel: problem, plan, compile, submit."""
from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from ..runtime import Queue
from .checks import DTYPES, check_addresses, check_same_dtype, row_stride, weight_layout
from .tuned import print_config, tuned_plan


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
    """The checked arguments of one grouped GEMM; w is the logical [E, N, K], rows are counts or ends (rows_format).

    row_indices: gathers rows of a (divided by slots), scatters rows of d, or both. row_scales: [total_rows] float32.
    choice: its part "forward" is for this GEMM.
    """
    a: torch.Tensor
    w: torch.Tensor
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

    @property
    def reads(self) -> dict[str, torch.Tensor | None]:
        """What is read, by the names that users know."""
        return {"a": self.a, "w": self.w, rows_name(self.rows_format): self.rows, "bias": self.bias,
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
    layout, w_stride, w_expert_stride = weight_layout("w", call.w)
    num_experts, n, k = call.w.shape
    shared = call.shared
    problem = GroupedGemmProblem(
        n=n, k=k, input=DTYPES[call.a.dtype], output=DTYPES[out.dtype], weights=layout,
        bias=None if call.bias is None else DTYPES[call.bias.dtype], rows_format=RowsFormat(call.rows_format),
        rows_bits=64 if call.rows.dtype == torch.int64 else 32, gathered=call.gathered,
        tf32=torch.get_float32_matmul_precision() != "highest", scattered=call.scattered, slots=call.slots,
        activation=call.activation, row_scale=call.row_scale, shared=0 if shared is None else shared.count)
    operands = Operands(a=call.a.data_ptr(), w=call.w.data_ptr(), d=out.data_ptr(), total_rows=call.total_rows,
                        a_rows=call.a.shape[0], num_experts=num_experts + problem.shared, a_stride=row_stride("a", call.a),
                        w_stride=w_stride, w_expert_stride=w_expert_stride, d_stride=row_stride("out", out), d_rows=out.shape[0],
                        **({} if shared is None else {
                            "shared_w": shared.first.data_ptr(), "shared_up": 0 if shared.up is None else shared.up.data_ptr(),
                            "shared_stride": shared.row_stride, "shared_expert_stride": shared.expert_stride}))
    return plan_launch(problem, operands, target, Schedule(call.schedule), call.choice.part("forward").config), operands


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
    return replace(call, a=call.a.new_zeros(call.a.shape[0], 1), w=call.w.new_zeros(*call.w.shape[:2], 1))


def pointer_of(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(call: Call, out: torch.Tensor) -> None:
    """Fills `out`. On xpu it returns once the kernel is submitted to torch's stream, on cpu when it is done."""
    if call.total_rows == 0 or out.shape[1] == 0 or call.w.shape[0] == 0:
        return
    check_same_dtype("w", call.w, "a", call.a)
    check_addresses(**call.reads, out=out)
    call = _with_columns(call)
    queue = queue_for(out.device)
    with finishing(queue, out.device) as used:
        used += submit(queue, call, out, zero_queue(out.device))


def zero_queue(device: torch.device) -> torch.Tensor:
    """The words of one launch's queue: in stream order, torch zeroes them before the launch and does not reuse them before its end."""
    return torch.zeros(QUEUE_WORDS, dtype=torch.int32, device=device)


@contextmanager
def finishing(queue: Queue, device: torch.device) -> Iterator[list]:
    """A list for what submitted kernels use. At its end, also after an error, waits on cpu, where memory is not freed in
    stream order."""
    used: list = []
    try:
        yield used
    finally:
        if device.type == "cpu":
            queue.wait()


def submit(queue: Queue, call: Call, out: torch.Tensor, queue_words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Submits the kernel; returns what must live until it has run (on cpu: until the queue is waited for)."""
    target = target_of(facts_of(queue))
    plan, operands = plan_call(call, out, target)
    if call.choice.autotune:
        def run(trial: LaunchPlan) -> None:
            with finishing(queue, out.device) as used:
                used += _submit(queue, call, trial, operands, out.device, zero_queue(out.device))

        plan = tuned_plan(queue, "grouped_gemm", plan, operands, target, call.rows, call.rows_format, run)
    print_config("grouped_gemm", plan, operands)
    return _submit(queue, call, plan, operands, out.device, queue_words)


def _submit(queue: Queue, call: Call, plan: LaunchPlan, operands: Operands, device: torch.device,
            queue_words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    kernel = compile_kernel(queue, grouped_gemm_source(plan.problem, plan.config))
    scratch = torch.empty(plan.scratch_bytes(operands), dtype=torch.uint8, device=device)
    kernel.launch(queue, plan.num_groups, plan.group_size, (
        operands.a, operands.w or None, operands.shared_w or None, operands.shared_up or None, pointer_of(call.bias), operands.d,
        call.rows.data_ptr(), pointer_of(call.row_indices), pointer_of(call.row_scales), queue_words.data_ptr(),
        scratch.data_ptr() or None, operands.total_rows, operands.a_rows, operands.d_rows, operands.a_stride, operands.w_stride,
        operands.w_expert_stride, operands.shared_stride, operands.shared_expert_stride,
        0 if call.bias is None else row_stride("bias", call.bias), operands.d_stride, operands.num_experts))
    return scratch, queue_words
