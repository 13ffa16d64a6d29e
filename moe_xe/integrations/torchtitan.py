"""torchtitan's token dispatcher on `moe_xe.distributed`; torchtitan is not needed."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import DeviceMesh

from ..distributed import combine, dispatch
from ..distributed.dispatch import Handle
from ..distributed.rows import SentRows
from ..ops import checks
from ..ops.routing.token_sort import sort_tokens

__all__ = ["DispatchMetadata", "TokenDispatcher"]


@dataclass(frozen=True)
class DispatchMetadata:
    """The way back: order of rows by expert, None if they are as they came; handle of `moe_xe.distributed`, None on one rank; scores."""
    order: SentRows | None
    handle: Handle | None
    scores: torch.Tensor


class TokenDispatcher:
    """Rows of tokens to the ranks of their experts and back, with the methods of torchtitan's token dispatchers (models/common).

    num_experts: of all ranks, which have them as DTensor's Shard(0) spreads them. top_k: experts of a token.
    rank_major: rows are as they come, by rank and from each rank by expert, and counts [ranks, local experts] say so, which
    `moe_xe.grouped_gemm` takes; by default rows are put in order of experts, and counts are [local experts].
    wire, wire_back: as in `moe_xe.distributed.dispatch`.
    """

    def __init__(self, num_experts: int, top_k: int, *, rank_major: bool = False, wire: str | None = None, wire_back: str | None = None):
        checks.check_flags(rank_major=rank_major)
        self.num_experts, self.top_k, self.rank_major = num_experts, top_k, rank_major
        self.ep_mesh: DeviceMesh | None = None
        self._wires = dict(wire=wire, wire_back=wire_back)

    def wire_meshes(self, *, ep_mesh: DeviceMesh | None, tp_mesh: DeviceMesh | None = None) -> None:
        """ep_mesh: the ranks of the experts; None: all experts are here. tp_mesh: ValueError with several ranks, as ranks with parts of a
        sequence are not supported."""
        if tp_mesh is not None and tp_mesh.size() > 1:
            raise ValueError(f"tp_mesh must be None or of one rank, got {tp_mesh}")
        self.ep_mesh = ep_mesh

    def dispatch(self, x_TD: torch.Tensor, topk_scores_TK: torch.Tensor, topk_expert_ids_TK: torch.Tensor,
                 num_local_tokens_per_expert_E: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """Rows [R, D], one for each pair of a token and an expert of this rank's, their counts, int32, and what `combine` needs.

        x_TD: [T, D], topk_scores_TK and topk_expert_ids_TK: [T, top_k], of this rank's tokens. num_local_tokens_per_expert_E: not needed.
        Differentiable in x_TD. Raises as `moe_xe.distributed.dispatch`.
        """
        checks.check_tensor("x_TD", x_TD, 2, "[T, D]")
        for name, tensor in (("topk_scores_TK", topk_scores_TK), ("topk_expert_ids_TK", topk_expert_ids_TK)):
            checks.check_tensor(name, tensor, 2, "[T, top_k]")
            if not checks.has_shape(tensor, (x_TD.shape[0], self.top_k)):
                raise ValueError(f"{name} must be [{x_TD.shape[0]}, {self.top_k}], T of x_TD and top_k, got {checks.shape_of(tensor)}")
        if self.ep_mesh is None:
            order, counts = _by_expert(topk_expert_ids_TK, self.num_experts)
            if self.rank_major:
                counts = counts[None]
            return order.of_tokens(x_TD), counts, DispatchMetadata(order, None, topk_scores_TK)
        sent = dispatch(x_TD, topk_expert_ids_TK, topk_scores_TK, num_experts=self.num_experts, group=self.ep_mesh, expand=True, **self._wires)
        rows, counts, order = sent.x, sent.tokens_per_expert, None
        if not self.rank_major:
            num_ranks, num_local = counts.shape
            experts = torch.arange(num_local, dtype=torch.int32, device=rows.device).repeat(num_ranks)
            experts = experts.repeat_interleave(counts.flatten(), output_size=rows.shape[0])
            order, counts = _by_expert(experts[:, None], num_local)
            rows = order.of_tokens(rows)
        return rows, counts, DispatchMetadata(order, sent.handle, topk_scores_TK)

    def combine(self, routed_output_RD: torch.Tensor, metadata: DispatchMetadata, x_TD: torch.Tensor, *,
                num_local_tokens_after_padding: int | None = None, local_seq_len_after_padding: int | None = None) -> torch.Tensor:
        """Each token's rows, times scores, summed in float32: [T, D], or zeros behind that up to num_local_tokens_after_padding.

        routed_output_RD: [R, D] in x_TD's dtype. local_seq_len_after_padding: not needed. Differentiable in the rows and the scores.
        """
        order, out = metadata.order, routed_output_RD
        if metadata.handle is None:
            scores = metadata.scores.float().flatten()[order.places.clamp(max=metadata.scores.numel() - 1)]
            out = order.sums(out.float() * scores[:, None]).to(x_TD.dtype)
        else:
            out = combine(out if order is None else order.sums(out), metadata.handle)
        padding = 0 if num_local_tokens_after_padding is None else num_local_tokens_after_padding - out.shape[0]
        return torch.nn.functional.pad(out, (0, 0, 0, padding)) if padding > 0 else out


def _by_expert(ids: torch.Tensor, num_experts: int) -> tuple[SentRows, torch.Tensor]:
    """Of ids [n, k]: rows in order of experts, and how many each expert has."""
    found = sort_tokens(ids, num_experts)
    pairs = found.row_pairs.long()      # -1 behind the last row, which stands for none
    places = torch.where(pairs < 0, ids.numel(), pairs)
    return SentRows(places, pairs.clamp(min=0) // ids.shape[1], ids, num_experts), found.tokens_per_expert
