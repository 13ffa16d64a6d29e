"""A block of few tokens in one launch (sycl_kernels/kernels/moe_block.cpp)."""
from __future__ import annotations

import torch

from ...jit import compile_kernel
from ...jit.block_source import block_source
from ...plan.block.one_launch import OneLaunch, plan_one_launch
from ...plan.launch import Target
from ...plan.problem import Operands
from ..checks import row_stride
from ..launch import Call, plan_call, pointer_of, print_config
from ..routing.token_sort import Routing, combine_problem, sort_problem
from ..submission import Submission


Plan = tuple[OneLaunch, Operands, Operands]     # with the operands of the first and the second GEMM


def plan_block(target: Target, routing: Routing, gate_up: Call, down: Call, y: torch.Tensor, out: torch.Tensor) -> Plan | None:
    """What would be launched, or None where the block takes several launches. y: where the second GEMM's results go, perhaps in
    a few more columns; may be out."""
    first, first_operands = plan_call(gate_up, down.a, target)
    second, second_operands = plan_call(down, y[:, :out.shape[1]], target)
    sort = sort_problem(routing, zero_dropped=out if y is out else None)
    combine = combine_problem(routing, y, out, target.is_cpu)
    block = plan_one_launch(first, second, sort, combine, routing.num_tokens, first_operands.num_experts)
    return None if block is None else (block, first_operands, second_operands)


def launch_block(submission: Submission, plan: Plan, routing: Routing, gate_up: Call, down: Call, out: torch.Tensor) -> None:
    """Submits the kernel."""
    block, first, second = plan
    routing.check_addresses()
    print_config("grouped_gemm", block.gate_up, first)
    print_config("grouped_gemm", block.down, second)
    submission.keep(routing, gate_up, down, out)
    kernel = compile_kernel(submission.queue, block_source(block))
    submission.launch(kernel, block.gate_up.num_groups, block.group_size, arguments(
        plan, routing, gate_up, down, out, submission.zeros(block.board_words(first.num_experts)),
        submission.empty(scratch_bytes(plan), dtype=torch.uint8)))


def arguments(plan: Plan, routing: Routing, gate_up: Call, down: Call, out: torch.Tensor, board: torch.Tensor, scratch: torch.Tensor) -> tuple:
    """Those of the kernel, in its order."""
    block, first, second = plan
    strides = [stride for gemm, call in ((first, gate_up), (second, down)) for stride in (
        gemm.w_stride, gemm.w_expert_stride, gemm.shared_stride, gemm.shared_expert_stride, _stride("bias", call.bias), gemm.d_stride)]
    return (first.a, first.w or None, first.shared_w or None, first.shared_up or None, *first.of_codes, pointer_of(gate_up.bias), first.d,
            second.w or None, second.shared_w or None, *second.of_codes, pointer_of(down.bias), second.d, routing.topk_ids.data_ptr(), pointer_of(routing.expert_map),
            pointer_of(routing.topk_weights), pointer_of(routing.shared_weights), gate_up.rows.data_ptr(), gate_up.row_indices.data_ptr(),
            gate_up.row_scales.data_ptr(), out.data_ptr(), board.data_ptr(), scratch.data_ptr(),
            scratch.data_ptr() + _first_scratch(plan), first.a_stride, *strides, row_stride("topk_ids", routing.topk_ids),
            _stride("topk_weights", routing.topk_weights), _stride("shared_weights", routing.shared_weights), row_stride("out", out),
            routing.routed_scaling_factor, 0 if routing.expert_map is None else routing.expert_map.shape[0], routing.num_tokens,
            routing.num_experts)


def scratch_bytes(plan: Plan) -> int:
    """Of both GEMMs."""
    block, _, second = plan
    return _first_scratch(plan) + block.down.scratch_bytes(second)


def _first_scratch(plan: Plan) -> int:
    """Bytes of the first GEMM's scratch; the second one's, behind it, is as aligned as torch's memory."""
    block, first, _ = plan
    return -(-block.gate_up.scratch_bytes(first) // _ALIGNMENT) * _ALIGNMENT


_ALIGNMENT = 64


def _stride(name: str, tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else row_stride(name, tensor)
