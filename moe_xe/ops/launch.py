"""From checked tensors to a launched kernel: problem, plan, compile, submit."""
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import runtime
from ..device import DeviceFacts, facts_of, queue_for
from ..jit import compile_kernel
from ..jit.source import grouped_gemm_source
from ..plan.config import Schedule
from ..plan.heuristics import fast_isa, has_wide_dpas
from ..plan.launch import LaunchPlan, Target, plan_launch
from ..plan.problem import GroupedGemmProblem, Operands, RowsFormat
from .checks import DTYPES, check_addresses, row_stride, weight_layout


@dataclass(frozen=True)
class Call:
    """The checked arguments of one grouped GEMM; w is the logical [E, N, K], rows are counts or ends."""
    a: torch.Tensor
    w: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor | None
    gather_indices: torch.Tensor | None
    out_dtype: torch.dtype
    schedule: str
    total_rows: int


@functools.lru_cache(maxsize=64)
def target_of(facts: DeviceFacts) -> Target:
    """What the planner needs of these facts."""
    is_cpu = facts.kind == "cpu"
    dpas = not is_cpu and has_wide_dpas(facts.has_matrix_engine, facts.sub_group_sizes)
    return Target(is_cpu, facts.xe_cores, dpas, fast_isa(runtime.cpu_isa(), facts.name) if is_cpu else None)


def plan_call(call: Call, out: torch.Tensor, rows_format: str, target: Target) -> tuple[LaunchPlan, Operands]:
    """What would be launched for this call."""
    layout, w_stride, w_expert_stride = weight_layout("w", call.w)
    num_experts, n, k = call.w.shape
    problem = GroupedGemmProblem(
        n=n, k=k, input=DTYPES[call.a.dtype], output=DTYPES[out.dtype], weights=layout,
        bias=None if call.bias is None else DTYPES[call.bias.dtype], rows_format=RowsFormat(rows_format),
        rows_bits=64 if call.rows.dtype == torch.int64 else 32, gathered=call.gather_indices is not None,
        tf32=torch.get_float32_matmul_precision() != "highest")
    operands = Operands(a=call.a.data_ptr(), w=call.w.data_ptr(), d=out.data_ptr(), total_rows=call.total_rows,
                        a_rows=call.a.shape[0], num_experts=num_experts, a_stride=row_stride("a", call.a), w_stride=w_stride,
                        w_expert_stride=w_expert_stride, d_stride=row_stride("out", out))
    return plan_launch(problem, operands, target, Schedule(call.schedule)), operands


def plan_for(call: Call, out: torch.Tensor, rows_format: str) -> LaunchPlan:
    """The plan for this call on the device of its tensors."""
    return plan_call(call, out, rows_format, target_of(facts_of(queue_for(out.device))))[0]


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch(call: Call, out: torch.Tensor, rows_format: str) -> None:
    """Fills `out`. On xpu it returns once the kernel is submitted to torch's stream, on cpu when it is done."""
    if call.total_rows == 0 or out.shape[1] == 0:
        return
    check_addresses(a=call.a, w=call.w, rows=call.rows, bias=call.bias, gather_indices=call.gather_indices, out=out)
    queue = queue_for(out.device)
    plan, operands = plan_call(call, out, rows_format, target_of(facts_of(queue)))
    kernel = compile_kernel(queue, grouped_gemm_source(plan.problem, plan.config))
    # both in stream order: torch zeroes the counter before the launch and reuses neither before its end
    tile_counter = torch.zeros(1, dtype=torch.int32, device=out.device)
    scratch = torch.empty(plan.num_groups * plan.scratch_bytes, dtype=torch.uint8, device=out.device)
    kernel.launch(queue, plan.num_groups, plan.group_size, (
        operands.a, operands.w, _pointer(call.bias), operands.d, call.rows.data_ptr(), _pointer(call.gather_indices),
        tile_counter.data_ptr(), scratch.data_ptr() or None, operands.total_rows, operands.a_rows, operands.a_stride,
        operands.w_stride, operands.w_expert_stride, 0 if call.bias is None else row_stride("bias", call.bias),
        operands.d_stride, operands.num_experts))
    if out.device.type == "cpu":
        queue.wait()
