"""The block's launches: sort, first GEMM, second GEMM, combine; and what stands in for a fusion that is switched off."""
from __future__ import annotations

from dataclasses import replace

import torch

from ...device import facts_of
from ...plan.block.one_launch import few_pairs, gains_from_int8_rows
from ...plan.block.token_sort import aligned_columns
from ...plan.choice.choice import Choice
from ...plan.launch import QUEUE_WORDS
from ...plan.problem import Dtype, RowScale
from ...quantized.weight import QuantizedWeight
from .. import checks
from ..checks import TORCH_DTYPES, row_stride
from ..gemm.quantize_rows import launch_quantize_rows
from ..launch import Call, SharedWeights, submit, target_of
from ..routing.token_sort import Routing, launch_combine, launch_sort
from ..submission import ALIGNMENT, Submission, padded
from ..weights import Weight
from .activate import launch_activate
from .activation import apply_activation
from .call import BLOCK, BlockCall, Fusions
from .one_launch import launch_block, plan_block

__all__ = ["run_block", "workspace_bytes"]


def _from_its_address(buffer: torch.Tensor) -> torch.Tensor:
    """The same bytes in a storage that begins with them: torch views other types at aligned offsets in a storage only."""
    if buffer.storage_offset() % ALIGNMENT == 0:
        return buffer
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(buffer))


class Workspace:
    """Pieces of one tensor, or of what the submission allocates."""

    def __init__(self, submission: Submission, buffer: torch.Tensor | None):
        self._submission, self._buffer, self._used = submission, buffer, 0
        if buffer is not None:
            self._buffer = _from_its_address(buffer[-buffer.data_ptr() % ALIGNMENT:])

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        if self._buffer is None:
            return self._submission.empty(*shape, dtype=dtype)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        piece = self._buffer[self._used:self._used + num_bytes].view(dtype).view(shape)
        self._used += padded(num_bytes)
        return piece


def workspace_bytes(num_tokens: int, top_k: int, hidden_size: int, intermediate_size: int, num_experts: int,
                    dtype: torch.dtype, shared_size: int, y_dtype: Dtype, activations: Dtype | None) -> int:
    """An upper bound of what `run_block` takes with all fusions on."""
    copies = -(-shared_size // intermediate_size)      # shared experts of the routed ones' size, if it divides theirs
    pairs = num_tokens * (top_k + copies)
    pieces = [4 * (num_experts + copies), 4 * pairs, 4 * pairs, 4 * QUEUE_WORDS * _NUM_QUEUES, pairs * intermediate_size * dtype.itemsize,
              num_tokens * shared_size * dtype.itemsize, num_tokens * 2 * shared_size * Dtype.f32.size,
              pairs * aligned_columns(hidden_size, y_dtype) * y_dtype.size if pairs > num_tokens else 0]
    if activations is not None:     # codes and scales
        pieces += [num_tokens * hidden_size, num_tokens * Dtype.f32.size, pairs * intermediate_size, pairs * Dtype.f32.size]
    return sum(map(padded, pieces)) + ALIGNMENT


_NUM_QUEUES = 5     # one for each GEMM: two of routed experts or all, three of a shared one apart


def merged_shared(call: BlockCall, fusions: Fusions) -> int:
    """How many groups of the routed experts' size the shared expert becomes in the same launches; 0: it has its own.

    An MLP of intermediate size s * I is the sum of s MLPs of size I: its gate and up rows and its down columns cut in s.
    """
    shared, size = call.shared, call.w2.shape[2]
    if shared is None or not (fusions.shared and fusions.gather and fusions.activation and fusions.scatter):
        return 0
    if any(isinstance(w, QuantizedWeight) for w in (call.w13, call.w2, shared.gate_proj, shared.up_proj, shared.down_proj)):
        return 0        # a kernel has weights of one kind
    routed_layouts = [checks.weight_layout("w", w)[0].value for w in (call.w13, call.w2)]
    strides_agree = shared.gate_proj is None or row_stride("gate_proj", shared.gate_proj) == row_stride("up_proj", shared.up_proj)
    fits = (shared.up_proj.shape[0] % size == 0 and routed_layouts == ["enk", "enk"] and not call.activation.interleaved and
            strides_agree and not (call.weight_on_input and shared.weights is not None))
    return shared.up_proj.shape[0] // size if fits else 0


def run_block(submission: Submission, call: BlockCall, fusions: Fusions, out: torch.Tensor, buffer: torch.Tensor | None) -> None:
    """Fills out."""
    x = call.hidden_states
    num_tokens, hidden_size = x.shape
    if out.numel() == 0:
        return
    checks.check_addresses(**BLOCK.tensors(call), out=out, workspace=buffer)
    space = Workspace(submission, buffer)
    num_experts = call.w13.shape[0]
    merged = merged_shared(call, fusions)
    num_shared = merged or int(call.shared is not None)
    weights = None
    if call.shared is not None and call.shared.weights is not None:
        weights = call.shared.weights.view(num_tokens, 1).expand(num_tokens, num_shared).contiguous()
    routing = Routing(call.topk_ids, num_experts, call.expert_map, num_shared, call.topk_weights, weights, call.routed_scaling_factor)
    counts = space.take(num_shared + num_experts, dtype=torch.int32)
    pairs = space.take(routing.num_pairs, dtype=torch.int32)
    scales = space.take(routing.num_pairs, dtype=torch.float32)
    queues = space.take(_NUM_QUEUES, QUEUE_WORDS, dtype=torch.int32)
    direct = routing.slots == 1 and fusions.scatter
    # one slot a token needs no y, if stores are scattered: the workspace has none then
    y_space = space if fusions.scatter else Workspace(submission, None)
    y = out if direct else y_space.take(routing.num_pairs, aligned_columns(hidden_size, call.y_dtype),
                                        dtype=TORCH_DTYPES[call.y_dtype])
    stages = _Stages(submission, call, fusions, space, routing)
    own = num_tokens * (num_shared - merged)       # rows of a shared expert with launches of its own, which come first
    gemms = stages.gemms(counts[num_shared - merged:], pairs[own:], scales[own:], merged)
    block = plan_block(target_of(facts_of(submission.queue)), routing, *gemms, y, out) if own == 0 and stages.can_be_one_launch() else None
    if block:
        launch_block(submission, block, routing, *gemms, out)
        return
    launch_sort(submission, routing, tokens_per_expert=counts.data_ptr(), row_pairs=pairs.data_ptr(), row_scales=scales.data_ptr(),
                queue_words=queues.data_ptr(), num_queue_words=queues.numel(), zero_dropped=out if direct else None)
    if own:
        stages.shared(y[:, :hidden_size], counts[:1], pairs[:own], scales[:own], queues[2:])
    stages.experts(y[:, :hidden_size], *gemms, queues[:2])
    if not direct:
        launch_combine(submission, routing, y, out)


class _Stages:
    """The two GEMMs of one call."""

    def __init__(self, submission: Submission, call: BlockCall, fusions: Fusions, space: Workspace, routing: Routing):
        self.submission, self.call, self.fusions, self.space, self.routing = submission, call, fusions, space, routing

    def can_be_one_launch(self) -> bool:
        """As far as the fusions, the tuner, which measures GEMMs, and the number of pairs say."""
        return (self.fusions == Fusions() and not self.call.choice.autotune and not self.multiplies_codes() and
                few_pairs(self.routing.num_tokens, self.routing.top_k))

    def multiplies_codes(self) -> bool:
        """Where it is asked for and gains."""
        routing = self.routing
        gains = not self.fusions.launches or gains_from_int8_rows(routing.num_tokens, routing.top_k, routing.num_experts)
        return self.call.activations is not None and gains

    def gemms(self, counts, pairs, scales, merged: int) -> tuple[Call, Call]:
        """The two GEMMs of the routed experts (behind those of `merged` shared ones) on the rows `pairs`, all fused; the second one's
        a is where the first one's results go."""
        call, size, shared = self.call, self.call.w2.shape[2], self.call.shared
        gate_up = down = None
        if merged:
            first, up = (shared.up_proj, None) if shared.gate_proj is None else (shared.gate_proj, shared.up_proj)
            stride = row_stride("up_proj", shared.up_proj)
            gate_up = SharedWeights(first, up, stride, size * stride, merged)
            down = SharedWeights(shared.down_proj, None, row_stride("down_proj", shared.down_proj), size, merged)
        on_input, on_output = (RowScale.sums, RowScale.none) if call.weight_on_input else (RowScale.none, RowScale.outputs)
        h = self.space.take(len(pairs), size, dtype=call.hidden_states.dtype)
        return (Call(call.hidden_states, call.w13, counts, len(pairs), call.b13, pairs, gathered=True, slots=self.routing.slots,
                     row_scales=scales, row_scale=on_input, activation=call.activation, shared=gate_up, choice=call.choice.part("gate_up"),
                     most_rows=self.routing.num_tokens),
                Call(h, call.w2, counts, len(pairs), call.b2, pairs, scattered=True, row_scales=scales, row_scale=on_output,
                     shared=down, choice=call.choice.part("down"), most_rows=self.routing.num_tokens))

    def experts(self, y, gemm1: Call, gemm2: Call, queues) -> None:
        """The results of `gemms` in the rows of y that their pairs name."""
        call, fusions, pairs, scales = self.call, self.fusions, gemm1.row_indices, gemm1.row_scales
        if not fusions.gather:
            self.submission.wait()
            gemm1 = replace(gemm1, a=call.hidden_states[pairs.clamp(min=0) // self.routing.slots], row_indices=None, gathered=False)
        if self.multiplies_codes():
            gemm1 = self._of_codes(gemm1)
        if fusions.activation:
            submit(self.submission, gemm1, gemm2.a, queues[0])
        else:
            sums = torch.zeros(len(pairs), call.w13.shape[1], dtype=torch.float32, device=y.device)
            submit(self.submission, replace(gemm1, activation=None), sums, queues[0])
            self.submission.wait()
            gemm2 = replace(gemm2, a=apply_activation(sums, call.activation).to(call.hidden_states.dtype))
        if self.multiplies_codes():
            gemm2 = self._of_codes(gemm2)
        if fusions.scatter:
            submit(self.submission, gemm2, y, queues[1])
        else:
            y_sorted = torch.zeros(len(pairs), y.shape[1], dtype=torch.float32, device=y.device)
            submit(self.submission, replace(gemm2, row_indices=None, scattered=False, row_scale=RowScale.none), y_sorted, queues[1])
            self.submission.wait()
            if not call.weight_on_input:
                y_sorted = y_sorted * scales[:, None]
            used = pairs >= 0
            y[pairs[used].long()] = y_sorted[used].to(y.dtype)

    def _of_codes(self, gemm: Call) -> Call:
        """The same on rows that are quantised now."""
        codes, scales = self.space.take(*gemm.a.shape, dtype=torch.int8), self.space.take(len(gemm.a), dtype=torch.float32)
        launch_quantize_rows(self.submission, gemm.a, codes, scales)
        return replace(gemm, a=codes, a_scales=scales)

    def shared(self, y, counts, pairs, scales, queues) -> None:
        """The shared expert with launches of its own."""
        call, shared = self.call, self.call.shared
        size, hidden_size = shared.up_proj.shape[-2:]
        h = self.space.take(len(pairs), size, dtype=call.hidden_states.dtype)
        activation = replace(call.activation, interleaved=False)
        choice = Choice(autotune=call.choice.autotune)      # a config is of the routed experts' sizes
        parts = [w for w in (shared.gate_proj, shared.up_proj) if w is not None]
        if any(isinstance(w, QuantizedWeight) for w in parts):
            z = self.space.take(len(pairs), len(parts) * size, dtype=torch.float32)
            for w, columns, queue in zip(parts, z.split(size, dim=1), queues[1:]):
                submit(self.submission, Call(call.hidden_states, _of_one_expert(w), counts, len(pairs), choice=choice), columns, queue)
            launch_activate(self.submission, z, activation, hs=h)
        else:
            first, up = parts[0], parts[1] if len(parts) > 1 else None
            if up is not None and row_stride("gate_proj", first) != row_stride("up_proj", up):
                first, up = first.contiguous(), up.contiguous()
            no_routed = first.new_empty(0, len(parts) * size, hidden_size)
            submit(self.submission, Call(call.hidden_states, no_routed, counts, len(pairs), activation=activation,
                             shared=SharedWeights(first, up, row_stride("gate_proj", first), 0, 1), choice=choice), h, queues[1])
        submit(self.submission, Call(h, _of_one_expert(shared.down_proj), counts, len(pairs), row_indices=pairs, scattered=True,
                         row_scales=scales, row_scale=RowScale.outputs, choice=choice), y, queues[0])


def _of_one_expert(w: Weight) -> Weight:
    return w if isinstance(w, QuantizedWeight) else w[None]
