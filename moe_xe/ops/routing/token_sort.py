"""Before the experts, tokens sorted by expert; behind them, each token's results summed. One launch each, no synchronisation."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...device import facts_of
from ...jit import compile_kernel
from ...jit.token_sort_source import combine_source, sort_source
from ...plan.problem import INT32_MAX, MAX_COLUMNS, Dtype
from ...plan.block.token_sort import (MAX_EXPERTS, MAX_PAIRS, MAX_TOP_K, CombineProblem, SortProblem,
                                      combine_columns, combine_groups, sort_groups, widest_access)
from .. import checks
from ..checks import DTYPES, row_stride
from ..eager import repeats
from ..launch import target_of
from ..library import define
from ..plain import takes_plain_tensors
from ..submission import Submission

__all__ = ["Routing", "SortedTokens", "check_routing", "combine", "launch_combine", "launch_sort", "sort_tokens"]


class SortedTokens(NamedTuple):
    """slots = top_k + num_shared. A pair is token * slots + slot; the shared experts' slots are behind the routed ones.

    tokens_per_expert: int32 [num_shared + num_experts], the rows of each group: first the shared experts, all tokens each.
    row_pairs: int32 [T * slots], the pair of each row, rising within a group. Beyond the last row: -1.
    row_scales: float32 [T * slots], the pair's weight times routed_scaling_factor, or its shared weight. Beyond: 0.
    """
    tokens_per_expert: torch.Tensor
    row_pairs: torch.Tensor
    row_scales: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """The checked arguments that say where tokens go; as those of `sort_tokens`."""
    topk_ids: torch.Tensor
    num_experts: int
    expert_map: torch.Tensor | None = None
    num_shared: int = 0
    topk_weights: torch.Tensor | None = None
    shared_weights: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def slots(self) -> int:
        return self.top_k + self.num_shared

    @property
    def num_pairs(self) -> int:
        return self.num_tokens * self.slots

    @property
    def id_bits(self) -> int:
        return 64 if self.topk_ids.dtype == torch.int64 else 32

    def check_addresses(self) -> None:
        checks.check_addresses(topk_ids=self.topk_ids, expert_map=self.expert_map, topk_weights=self.topk_weights,
                               shared_weights=self.shared_weights)


@repeats
@takes_plain_tensors
def sort_tokens(topk_ids: torch.Tensor, num_experts: int, *, topk_weights: torch.Tensor | None = None,
                expert_map: torch.Tensor | None = None, num_shared: int = 0, shared_weights: torch.Tensor | None = None,
                routed_scaling_factor: float = 1.0) -> SortedTokens:
    """Sorts (token, expert) pairs by expert, stably: an expert's pairs stay in order.

    topk_ids: [T, top_k] int32 or int64, rows contiguous. Ids outside [0, num_experts) are dropped: they get no row.
    num_experts: routed experts here.
    topk_weights: [T, top_k] bfloat16, float16 or float32; 1 by default.
    expert_map: [num_global_experts] int32: topk_ids are global ids, this is the local id of each, or -1 for none.
    num_shared: shared experts, to which every token goes; they are the first groups.
    shared_weights: [T, num_shared], types as topk_weights; 1 by default.
    routed_scaling_factor: multiplies the routed experts' weights.

    row_scales are differentiable in both weights. Raises TypeError or ValueError naming the argument.
    """
    routing = check_routing(topk_ids, num_experts, topk_weights=topk_weights, expert_map=expert_map, num_shared=num_shared,
                            shared_weights=shared_weights, routed_scaling_factor=routed_scaling_factor)
    return SortedTokens(*torch.ops.moe_xe.sort_tokens(topk_ids, routing.num_experts, topk_weights, expert_map,
                                                      routing.num_shared, shared_weights, routing.routed_scaling_factor))


@repeats
@takes_plain_tensors
def combine(y: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, *, expert_map: torch.Tensor | None = None,
            num_shared: int = 0, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sums the rows of each token, in order of its slots, in float32.

    y: [T * (top_k + num_shared), H] bfloat16, float16 or float32, rows contiguous; row p belongs to pair p. Rows of dropped
      pairs are left out, whatever they hold.
    topk_ids, num_experts, expert_map, num_shared: as for `sort_tokens`.
    out_dtype: bfloat16, float16 or float32; y's dtype by default.

    Returns [T, H]; zeros for a token without experts. Differentiable in y. Raises TypeError or ValueError naming the argument.
    """
    routing = check_routing(topk_ids, num_experts, expert_map=expert_map, num_shared=num_shared)
    checks.check_tensor("y", y, 2, "[T * (top_k + num_shared), H]")
    checks.check_dtype("y", y.dtype)
    if not checks.holds(y.shape[0] == routing.num_pairs):
        raise ValueError(f"y must have a row for each of the {routing.num_tokens} x {routing.slots} pairs, "
                         f"got {checks.shape_of(y)}")
    if not checks.holds(y.shape[1] <= MAX_COLUMNS):
        raise ValueError(f"y must have at most {MAX_COLUMNS} columns, got {checks.shape_of(y)}")
    row_stride("y", y)
    checks.check_same_device(y=y, topk_ids=topk_ids)
    out_dtype = out_dtype or y.dtype
    checks.check_dtype("out_dtype", out_dtype)
    return torch.ops.moe_xe.combine(y, topk_ids, routing.num_experts, expert_map, routing.num_shared, out_dtype)


def check_routing(topk_ids, num_experts, *, topk_weights=None, expert_map=None, num_shared=0, shared_weights=None,
                  routed_scaling_factor=1.0) -> Routing:
    """Checks all that can be known without the device."""
    checks.check_tensor("topk_ids", topk_ids, 2, "[T, top_k]")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    num_tokens, top_k = topk_ids.shape
    if not checks.holds(top_k >= 1) or not checks.holds(top_k <= MAX_TOP_K):
        raise ValueError(f"topk_ids must have 1 to {MAX_TOP_K} experts a token, got {checks.shape_of(topk_ids)}")
    row_stride("topk_ids", topk_ids)
    num_experts = checks.check_count("num_experts", num_experts, 1, MAX_EXPERTS)
    num_shared = checks.check_count("num_shared", num_shared, 0, MAX_EXPERTS)
    if not checks.holds(num_tokens * (top_k + num_shared) <= MAX_PAIRS):
        raise ValueError(f"tokens x slots must be at most {MAX_PAIRS}, got {num_tokens} x {top_k + num_shared} "
                         f"(top_k = {top_k}, num_shared = {num_shared})")
    if topk_weights is not None:
        _check_weights("topk_weights", topk_weights, num_tokens, top_k, "[T, top_k]")
    if shared_weights is not None:
        _check_weights("shared_weights", shared_weights, num_tokens, num_shared, "[T, num_shared]")
    if expert_map is not None:
        checks.check_indices("expert_map", expert_map, None, "num_global_experts", (torch.int32,))
        if not checks.holds(expert_map.shape[0] >= 1):
            raise ValueError("expert_map must have at least one entry, got none")
        if not checks.holds(expert_map.shape[0] <= INT32_MAX):
            raise ValueError(f"expert_map must have fewer than 2^31 entries, got {expert_map.shape[0]}")
    factor = checks.check_float32("routed_scaling_factor", routed_scaling_factor)
    checks.check_same_device(topk_ids=topk_ids, topk_weights=topk_weights, expert_map=expert_map, shared_weights=shared_weights)
    return Routing(topk_ids, num_experts, expert_map, num_shared, topk_weights, shared_weights, factor)


def _check_weights(name: str, weights, num_tokens: int, columns: int, layout: str) -> None:
    checks.check_tensor(name, weights, 2, layout)
    checks.check_dtype(name, weights.dtype)
    if not checks.has_shape(weights, (num_tokens, columns)):
        raise ValueError(f"{name} must be {layout} = [{num_tokens}, {columns}], got {list(weights.shape)}")
    row_stride(name, weights)


def launch_sort(submission: Submission, routing: Routing, *, tokens_per_expert: int, row_pairs: int, row_scales: int,
                queue_words: int = 0, num_queue_words: int = 0, zero_dropped: torch.Tensor | None = None) -> None:
    """Submits the sort. The outputs are addresses of SortedTokens' arrays.

    queue_words: address of num_queue_words int32 that become zero: of the GEMMs' queues.
    zero_dropped: [T, H] with contiguous rows, only for one slot a token: the rows of dropped tokens become zero.
    """
    if zero_dropped is not None and routing.slots != 1:
        raise ValueError(f"zero_dropped is for one slot a token, got {routing.slots}")
    routing.check_addresses()
    checks.check_addresses(zero_dropped=zero_dropped)
    submission.keep(routing)
    target = target_of(facts_of(submission.queue))
    out, out_stride, out_row_bytes = _rows_in_bytes(zero_dropped)
    groups, group_size = sort_groups(routing.num_tokens, routing.num_experts, target.is_cpu, target.cores)
    kernel = compile_kernel(submission.queue, sort_source(sort_problem(routing, zero_dropped), target.is_cpu))
    submission.launch(kernel, groups, group_size, (
        *_ids(routing), *_rows("topk_weights", routing.topk_weights), *_rows("shared_weights", routing.shared_weights),
        routing.routed_scaling_factor, tokens_per_expert, row_pairs, row_scales, queue_words, num_queue_words,
        out, out_stride, out_row_bytes, routing.num_tokens, routing.num_experts))


def launch_combine(submission: Submission, routing: Routing, y: torch.Tensor, out: torch.Tensor) -> None:
    """Submits the sums.

    y: [T * slots, H or more], rows contiguous; columns behind H hold anything, and let a lane's last load be a whole one.
    out: [T, H], rows contiguous.
    """
    num_tokens = out.shape[0]
    if out.numel() == 0:
        return
    routing.check_addresses()
    checks.check_addresses(y=y, out=out)
    submission.keep(routing)
    target = target_of(facts_of(submission.queue))
    problem = combine_problem(routing, y, out, target.is_cpu)
    groups, group_size = combine_groups(problem, num_tokens, target.is_cpu, target.cores)
    kernel = compile_kernel(submission.queue, combine_source(problem, target.isa))
    submission.launch(kernel, groups, group_size, (
        *_rows("y", y), *_ids(routing), *_rows("out", out), num_tokens, routing.num_experts))


def sort_problem(routing: Routing, zero_dropped: torch.Tensor | None = None) -> SortProblem:
    """What the sort is compiled for; zero_dropped as for `launch_sort`."""
    return SortProblem(routing.top_k, routing.num_shared, routing.id_bits, routing.expert_map is not None, _dtype(routing.topk_weights),
                       _dtype(routing.shared_weights), 0 if zero_dropped is None else widest_access(*_rows_in_bytes(zero_dropped)))


def combine_problem(routing: Routing, y: torch.Tensor, out: torch.Tensor, is_cpu: bool) -> CombineProblem:
    """What the sums are compiled for; y and out as for `launch_combine`."""
    (y_row, input), (out_row, output) = ((_rows(name, rows), DTYPES[rows.dtype]) for name, rows in (("y", y), ("out", out)))
    hidden_size = out.shape[1]
    columns = (1, 1) if is_cpu else combine_columns((*y_row, y.shape[1]), input, (*out_row, hidden_size), output)
    return CombineProblem(hidden_size, input, output, routing.top_k, routing.num_shared, routing.id_bits,
                          routing.expert_map is not None, *columns)


def _dtype(tensor: torch.Tensor | None) -> Dtype | None:
    return None if tensor is None else DTYPES[tensor.dtype]


def _rows(name: str, tensor: torch.Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), row_stride(name, tensor))


def _rows_in_bytes(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Address, bytes between rows and bytes of a row."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), row_stride("out", tensor) * tensor.element_size(), tensor.shape[1] * tensor.element_size()


def _ids(routing: Routing) -> tuple[int, int, int, int]:
    size, address = (0, 0) if routing.expert_map is None else (routing.expert_map.shape[0], routing.expert_map.data_ptr())
    return *_rows("topk_ids", routing.topk_ids), address, size


_ROUTING = "Tensor topk_ids, int num_experts"


def _sort_tokens(submission, topk_ids, num_experts, topk_weights, expert_map, num_shared, shared_weights, routed_scaling_factor):
    routing = Routing(topk_ids, num_experts, expert_map, num_shared, topk_weights, shared_weights, routed_scaling_factor)
    tokens_per_expert = submission.result(num_shared + num_experts, dtype=torch.int32)
    row_pairs = submission.result(routing.num_pairs, dtype=torch.int32)
    row_scales = submission.result(routing.num_pairs, dtype=torch.float32)
    launch_sort(submission, routing, tokens_per_expert=tokens_per_expert.data_ptr(), row_pairs=row_pairs.data_ptr(),
                row_scales=row_scales.data_ptr())
    return tokens_per_expert, row_pairs, row_scales


def _combine(submission, y, topk_ids, num_experts, expert_map, num_shared, out_dtype):
    out = submission.result(topk_ids.shape[0], y.shape[1], dtype=out_dtype)
    launch_combine(submission, Routing(topk_ids, num_experts, expert_map, num_shared), y, out)
    return out


def _fake_sort(topk_ids, num_experts, topk_weights, expert_map, num_shared, shared_weights, routed_scaling_factor):
    pairs = topk_ids.shape[0] * (topk_ids.shape[1] + num_shared)
    return (topk_ids.new_empty(num_shared + num_experts, dtype=torch.int32), topk_ids.new_empty(pairs, dtype=torch.int32),
            topk_ids.new_empty(pairs, dtype=torch.float32))


def _fake_combine(y, topk_ids, num_experts, expert_map, num_shared, out_dtype):
    return y.new_empty(topk_ids.shape[0], y.shape[1], dtype=out_dtype)


define("sort_tokens", f"({_ROUTING}, Tensor? topk_weights, Tensor? expert_map, int num_shared, Tensor? shared_weights, "
                      "float routed_scaling_factor) -> (Tensor, Tensor, Tensor)", _sort_tokens, fake=_fake_sort)
define("combine", f"(Tensor y, {_ROUTING}, Tensor? expert_map, int num_shared, ScalarType out_dtype) -> Tensor", _combine,
       fake=_fake_combine)
