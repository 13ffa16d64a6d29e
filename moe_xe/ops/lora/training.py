"""The block with low-rank adapters, forward and backward, and their ops: an adapter is two more grouped GEMMs, and no weights are
merged."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan.choice.choice import Choice
from ..block.activate import activate, activate_backward
from ..block.call import BlockCall
from ..block.training import topk_gradient
from ..checks import TORCH_DTYPES
from ..gemm.grouped_gemm import grouped_gemm
from ..gemm.grouped_outer import grouped_outer, weights_gradient
from ..routing.token_sort import SortedTokens, combine, sort_tokens
from ..signature import Signature
from ..submission import Submission
from ..training_op import define_training_op
from ..weights import Weight

__all__ = ["GRADIENTS", "LORA", "LoraAdapter", "LoraCall"]

# what can have a gradient, in the order in which ops pass flags and results
GRADIENTS = ("hidden_states", "w13", "w2", "topk_weights", "b13", "b2", "lora13.a", "lora13.b", "lora2.a", "lora2.b")


@dataclass(frozen=True)
class LoraAdapter:
    """What is added to each expert's weights [N, K], without forming it: ``scaling * b[e] @ a[e]``.

    a: [E, r, K], b: [E, N, r], whatever the layout of the weights in memory; bfloat16, float16 or float32, computed with
    in the hidden states' dtype.
    """
    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0

    @property
    def transposed(self) -> LoraAdapter:
        """What is added to the transposed weights, which gradients are multiplied with."""
        return LoraAdapter(self.b.transpose(1, 2), self.a.transpose(1, 2), self.scaling)


@dataclass(frozen=True)
class LoraCall(BlockCall):
    """The checked arguments; adapters are of the hidden states' dtype. There is no shared expert, nor weight_on_input."""
    lora13: LoraAdapter | None = None
    lora2: LoraAdapter | None = None


LORA = Signature(LoraCall)


@dataclass(frozen=True)
class Saved:
    """What backward needs besides the arguments: the sorted rows (routing/token_sort.py); z, the sums before the activation,
    [rows, 2I or I]; low, the rows times lora13.a, [rows, r]. The last two are empty where backward computes them again."""
    tokens_per_expert: torch.Tensor
    row_pairs: torch.Tensor
    row_scales: torch.Tensor
    z: torch.Tensor
    low: torch.Tensor

    @property
    def sorted(self) -> SortedTokens:
        return SortedTokens(self.tokens_per_expert, self.row_pairs, self.row_scales)


def forward(_: Submission, call: LoraCall, recompute: bool) -> tuple[torch.Tensor, Saved]:
    """The routed experts' part of the block, [T, H]."""
    x, (num_experts, n13, _) = call.hidden_states, call.w13.shape
    nothing = x.new_empty(0, n13), x.new_empty(0, _rank(call.lora13))
    if call.topk_ids.numel() == 0:
        empty = SortedTokens(*(x.new_zeros(length, dtype=dtype) for length, dtype in (
            (num_experts, torch.int32), (0, torch.int32), (0, torch.float32))))
        return torch.zeros_like(x, memory_format=torch.contiguous_format), Saved(*empty, *nothing)
    rows = sort_tokens(call.topk_ids, num_experts, topk_weights=call.topk_weights, expert_map=call.expert_map,
                       routed_scaling_factor=call.routed_scaling_factor)
    z, low = _from_tokens(call, rows, x, call.w13, call.lora13, call.choice.part("gate_up"), call.b13)
    h = activate(z, call.activation, row_pairs=rows.row_pairs)
    saved = Saved(*rows, *(nothing if recompute else (z, low)))
    del z
    low2 = None if call.lora2 is None else grouped_gemm(h, call.lora2.a, rows.tokens_per_expert, autotune=call.choice.autotune)
    return _to_tokens(call, rows, h, low2, call.w2, call.lora2, call.choice.part("down"), TORCH_DTYPES[call.y_dtype], bias=call.b2,
                      row_scales=rows.row_scales), saved


def backward(_: Submission, grad_out: torch.Tensor, call: LoraCall, saved: Saved, needed: dict[str, bool]) -> dict[str, torch.Tensor]:
    """The gradients that are needed, by name, each in its argument's shape and dtype; weights' in their memory layout."""
    x, rows = call.hidden_states, saved.sorted
    counts, pairs, scales = rows
    slots = call.topk_ids.shape[1]
    if pairs.numel() == 0:
        return {name: torch.zeros_like(tensor) for name, tensor in LORA.tensors(call).items() if needed.get(name)}
    grad_out = grad_out.contiguous().to(x.dtype)
    z, low = (saved.z, saved.low) if saved.z.numel() else _from_tokens(call, rows, x, call.w13, call.lora13,
                                                                              call.choice.part("gate_up"), call.b13)

    of_first = any(needed[name] for name in ("hidden_states", "w13", "b13", "lora13.a", "lora13.b"))
    of_second = any(needed[name] for name in ("w2", "lora2.a", "lora2.b"))
    want = [name for name, wanted in (("dz", of_first), ("hs", of_second), ("dscale", needed["topk_weights"])) if wanted]
    result = {}
    if want:
        # g, and so its low-rank part, is of a row without its factor; activate_backward multiplies
        g, low_g = _from_tokens(call, rows, grad_out, call.w2.transpose(1, 2), call.lora2 and call.lora2.transposed,
                                call.choice.part("down").part("dX"))
        grads = activate_backward(z, g, call.activation, row_scales=scales, row_pairs=pairs, want=want)
        del g, z
        if needed["w2"]:
            result["w2"] = weights_gradient(call.w2, grad_out, grads.hs, counts, pairs, None, slots,
                                            choice=call.choice.part("down").part("dW"))
        if needed["lora2.a"]:
            result["lora2.a"] = _adapter_gradient(call, call.lora2, low_g, grads.hs, counts)
        if needed["lora2.b"]:
            low_h = grouped_gemm(grads.hs, call.lora2.a, counts, autotune=call.choice.autotune)
            result["lora2.b"] = _adapter_gradient(call, call.lora2, grad_out, low_h, counts, gather_indices_left=pairs,
                                                  gather_divisor=slots)
        if of_first:
            _backward_of_first_gemm(call, rows, grads.dz, low, needed, result)
        if needed["topk_weights"]:
            result["topk_weights"] = topk_gradient(call, counts, pairs, grads.dscale, grad_out)
    if needed["b2"]:
        sums = grouped_outer(scales[:, None], grad_out.float(), counts, gather_indices_right=pairs, gather_divisor=slots)
        result["b2"] = sums[:, 0].to(call.b2.dtype)
    return result


def _rank(adapter: LoraAdapter | None) -> int:
    return 0 if adapter is None else adapter.a.shape[1]


def _from_tokens(block: BlockCall, rows: SortedTokens, tokens: torch.Tensor, w: Weight, adapter: LoraAdapter | None,
                 choice: Choice, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted rows of tokens times the adapted weights: [rows, N]; and times the adapter's a: [rows, r].

    choice: of the product with w; adapters have none of their own but the tuner's.
    """
    gathered = {"gather_indices": rows.row_pairs, "gather_divisor": block.topk_ids.shape[1]}
    sums = grouped_gemm(tokens, w, rows.tokens_per_expert, bias=bias, **gathered, **choice.arguments)
    if adapter is None:
        return sums, sums.new_empty(0, 0)
    low = grouped_gemm(tokens, adapter.a, rows.tokens_per_expert, autotune=choice.autotune, **gathered)
    return sums.add_(grouped_gemm(low, adapter.b, rows.tokens_per_expert, autotune=choice.autotune), alpha=adapter.scaling), low


def _to_tokens(block: BlockCall, rows: SortedTokens, sorted_rows: torch.Tensor, low: torch.Tensor | None, w: Weight,
               adapter: LoraAdapter | None, choice: Choice, y_dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    """Sorted rows times the adapted weights, summed for each token: [T, N]. low: the rows times the adapter's a. y_dtype: of
    the rows before they are summed.

    The two products are summed apart, so that only one of them is there for every pair.
    """
    def summed(left, weights, out_dtype, **more):
        y = grouped_gemm(left, weights, rows.tokens_per_expert, scatter_indices=rows.row_pairs, out_dtype=y_dtype, **more)
        return combine(y, block.topk_ids, block.w13.shape[0], expert_map=block.expert_map, out_dtype=out_dtype)

    dtype = sorted_rows.dtype
    if adapter is None:
        return summed(sorted_rows, w, dtype, **options, **choice.arguments)
    out = summed(sorted_rows, w, torch.float32, **options, **choice.arguments)
    of_adapter = summed(low, adapter.b, torch.float32, row_scales=options.get("row_scales"),
                        autotune=choice.autotune)
    return out.add_(of_adapter, alpha=adapter.scaling).to(dtype)


def _adapter_gradient(block: BlockCall, adapter: LoraAdapter, left: torch.Tensor, right: torch.Tensor, counts: torch.Tensor,
                      **gather) -> torch.Tensor:
    gradient = grouped_outer(left, right, counts, out_dtype=torch.float32, autotune=block.choice.autotune, **gather)
    return gradient.mul_(adapter.scaling).to(adapter.a.dtype)


def _backward_of_first_gemm(call: LoraCall, rows: SortedTokens, dz: torch.Tensor, low: torch.Tensor, needed: dict[str, bool],
                            result: dict[str, torch.Tensor]) -> None:
    adapter, (counts, pairs, _) = call.lora13, rows
    x, slots = call.hidden_states, call.topk_ids.shape[1]
    low_dz = None
    if adapter is not None and (needed["hidden_states"] or needed["lora13.a"]):
        low_dz = grouped_gemm(dz, adapter.transposed.a, counts, autotune=call.choice.autotune)
    if needed["w13"]:
        result["w13"] = weights_gradient(call.w13, dz, x, counts, None, pairs, slots,
                                         choice=call.choice.part("gate_up").part("dW"))
    if needed["b13"]:
        ones = torch.ones(len(pairs), 1, dtype=dz.dtype, device=dz.device)
        result["b13"] = grouped_outer(ones, dz, counts, out_dtype=torch.float32)[:, 0].to(call.b13.dtype)
    if needed["lora13.a"]:
        result["lora13.a"] = _adapter_gradient(call, adapter, low_dz, x, counts, gather_indices_right=pairs, gather_divisor=slots)
    if needed["lora13.b"]:
        result["lora13.b"] = _adapter_gradient(call, adapter, dz, low, counts)
    if needed["hidden_states"]:
        result["hidden_states"] = _to_tokens(call, rows, dz, low_dz, call.w13.transpose(1, 2), adapter and adapter.transposed,
                                             call.choice.part("gate_up").part("dX"))


def _fake_saved(call: LoraCall, recompute: bool) -> Saved:
    x, ids, (num_experts, n13, _) = call.hidden_states, call.topk_ids, call.w13.shape
    rows, rank = ids.numel(), _rank(call.lora13)
    kept = 0 if recompute else rows
    return Saved(ids.new_empty(num_experts, dtype=torch.int32), ids.new_empty(rows, dtype=torch.int32),
                 ids.new_empty(rows, dtype=torch.float32), x.new_empty(kept, n13), x.new_empty(kept if rank else 0, rank))


define_training_op("lora_moe", LORA, Signature(Saved), GRADIENTS, forward=forward, backward=backward, fake_saved=_fake_saved)
