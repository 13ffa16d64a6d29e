"""Every public op with every argument that is a tensor, small; for tests of what all of them must do."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass, replace

import torch

import moe_xe
from moe_xe import LoraAdapter, SharedExpert
from moe_xe.ops.block.activate import activate, activate_backward
from moe_xe.ops.gemm.grouped_outer import grouped_outer
from moe_xe.plan.problem import Activation

T, H, I, E, K = 6, 16, 8, 3, 2
ROWS = T * K


@dataclass(frozen=True)
class OpCase:
    """arguments: by name; tensors also within dataclasses, whose parts are named as moe_xe's messages do."""
    op: Callable
    arguments: dict

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor):
                yield name, value
            elif is_dataclass(value):
                yield from ((f"{name}.{part}", inner) for part, inner in vars(value).items() if isinstance(inner, torch.Tensor))

    def mapped(self, function: Callable[[str, torch.Tensor], torch.Tensor]) -> OpCase:
        """The case with function(name, tensor) instead of each tensor."""
        changed = {name: function(name, tensor) for name, tensor in self.tensors()}
        arguments = {}
        for name, value in self.arguments.items():
            parts = {place.partition(".")[2]: tensor for place, tensor in changed.items() if place.partition(".")[0] == name}
            arguments[name] = parts[""] if "" in parts else replace(value, **parts) if parts else value
        return OpCase(self.op, arguments)

    def __call__(self):
        return self.op(**self.arguments)


def every_op(dtype: torch.dtype = torch.float32) -> dict[str, OpCase]:
    """Fresh random arguments; the names are the ops', with a word where an op is there twice."""
    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    ids, counts = torch.randint(0, E, (T, K), dtype=torch.int32), torch.tensor([5, 0, 7])
    pairs, ends = torch.randperm(ROWS).int(), counts.cumsum(0).int()
    expert_map = torch.randperm(E).int()
    shared = SharedExpert(values(I, H), values(H, I), values(I, H), torch.rand(T))
    block = dict(hidden_states=values(T, H), w13=values(E, 2 * I, H), w2=values(E, H, I), topk_weights=torch.rand(T, K), topk_ids=ids,
                 b13=values(E, 2 * I), b2=values(E, H), expert_map=expert_map, shared=shared)
    size = moe_xe.fused_moe_workspace_bytes(T, K, H, I, E, dtype=dtype, shared_intermediate_size=I)
    act = Activation()
    return {
        "grouped_gemm": OpCase(moe_xe.grouped_gemm, dict(
            a=values(T, H), w=values(E, I, H), tokens_per_expert=counts, bias=values(E, I), gather_indices=pairs, gather_divisor=K,
            row_scales=torch.rand(ROWS), out=values(ROWS, I))),
        "grouped_gemm scattered": OpCase(moe_xe.grouped_gemm, dict(
            a=values(ROWS, H), w=values(E, I, H), tokens_per_expert=counts, scatter_indices=pairs, row_scales=torch.rand(ROWS))),
        "grouped_mm": OpCase(moe_xe.grouped_mm, dict(mat_a=values(ROWS, H), mat_b=values(E, H, I), offs=ends, bias=values(E, I))),
        "grouped_mm 2D": OpCase(moe_xe.grouped_mm, dict(mat_a=values(H, ROWS), mat_b=values(ROWS, I), offs=ends)),
        "grouped_mm 3D": OpCase(moe_xe.grouped_mm, dict(mat_a=values(E, T, H), mat_b=values(E, H, I))),
        "grouped_outer": OpCase(grouped_outer, dict(
            left=values(ROWS, I), right=values(T, H), tokens_per_expert=counts, gather_indices_right=pairs, gather_divisor=K,
            out=values(E, I, H), accumulate=True)),
        "grouped_outer left": OpCase(grouped_outer, dict(
            left=values(T, I), right=values(ROWS, H), tokens_per_expert=counts, gather_indices_left=pairs, gather_divisor=K)),
        "fused_moe": OpCase(moe_xe.fused_moe, dict(
            **block, out=values(T, H), workspace=torch.empty(size, dtype=torch.uint8))),
        "lora_moe": OpCase(moe_xe.lora_moe, dict(
            **block, lora13=LoraAdapter(values(E, 4, H), values(E, 2 * I, 4)), lora2=LoraAdapter(values(E, 4, I), values(E, H, 4)))),
        "route": OpCase(moe_xe.route, dict(router_logits=values(T, 8), top_k=K, scoring="sigmoid", correction_bias=values(8))),
        "sort_tokens": OpCase(moe_xe.sort_tokens, dict(
            topk_ids=ids, num_experts=E, topk_weights=torch.rand(T, K), expert_map=expert_map, num_shared=1,
            shared_weights=torch.rand(T, 1))),
        "combine": OpCase(moe_xe.combine, dict(
            y=values(T * (K + 1), H), topk_ids=ids, num_experts=E, expert_map=expert_map, num_shared=1)),
        "activate": OpCase(activate, dict(z=values(ROWS, 2 * I), activation=act, row_pairs=pairs)),
        "activate_backward": OpCase(activate_backward, dict(
            z=values(ROWS, 2 * I), g=values(ROWS, I), activation=act, row_scales=torch.rand(ROWS), row_pairs=pairs)),
    }
