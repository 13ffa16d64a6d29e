"""The steps of an MoE MLP with torch's own operations: routing, sorting by expert, grouped GEMM, and the block of them."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["calculate_topk", "get_routing_indices", "permute", "torch_grouped_gemm", "torch_moe_block", "unpermute"]


def calculate_topk(router_logits: torch.Tensor, top_k: int, *, scoring: str = "softmax",
                   renormalize: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of every token and their weights.

    router_logits: [tokens, E], any float dtype. scoring: "softmax" over all experts, or "sigmoid"; in float32.
    renormalize: the chosen weights of a token sum to one. Returns topk_weights, float32, and topk_ids, int64, both
    [tokens, top_k], by falling weight. Raises ValueError for another scoring, or top_k outside [1, E].
    """
    if not 1 <= top_k <= router_logits.shape[-1]:
        raise ValueError(f"top_k must lie in [1, {router_logits.shape[-1]}], the number of experts, got {top_k}")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f'scoring must be "softmax" or "sigmoid", got {scoring!r}')
    logits = router_logits.float()
    if scoring == "softmax":
        topk_weights, topk_ids = logits.softmax(-1).topk(top_k, dim=-1)
    else:       # large logits share a sigmoid of one, but not their order
        top_logits, topk_ids = logits.topk(top_k, dim=-1)
        topk_weights = top_logits.sigmoid()
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    return topk_weights, topk_ids


def get_routing_indices(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How the flattened choices sort by expert, without host synchronisation.

    topk_ids: [tokens, topk], an integer dtype, each in [0, num_experts). Returns m_sizes, [num_experts] int32, the rows of
    each expert, and gather_indices, [tokens * topk] int32: the i-th sorted row is choice gather_indices[i]. Choices of
    the same expert stay in token order.
    """
    ids = topk_ids.flatten().long()
    m_sizes = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
    m_sizes.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
    return m_sizes, ids.argsort(stable=True).to(torch.int32)


def permute(hidden_states: torch.Tensor, gather_indices: torch.Tensor, topk: int) -> torch.Tensor:
    """[tokens, H] -> [tokens * topk, H], sorted by expert: row i is the token of choice gather_indices[i]."""
    return hidden_states[gather_indices.long() // topk]


def unpermute(sorted_rows: torch.Tensor, gather_indices: torch.Tensor) -> torch.Tensor:
    """[tokens * topk, H] sorted by expert -> in token order: row i becomes row gather_indices[i]."""
    return torch.empty_like(sorted_rows).index_copy(0, gather_indices.long(), sorted_rows)


def torch_grouped_gemm(X: torch.Tensor, W: torch.Tensor, m_sizes: torch.Tensor) -> torch.Tensor:
    """One torch matmul an expert: X [total_rows, K] sorted by expert, W [E, N, K], m_sizes [E] -> [total_rows, N].

    Copies m_sizes to the host. Raises ValueError unless they sum to X's rows.
    """
    sizes = m_sizes.tolist()
    if sum(sizes) != X.shape[0]:
        raise ValueError(f"m_sizes must sum to X's {X.shape[0]} rows, got {sum(sizes)}")
    return torch.cat([rows @ w.T for rows, w in zip(X.split(sizes), W)])


def torch_moe_block(hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor,
                    topk_weights: torch.Tensor, topk_ids: torch.Tensor, *, act_fn: Callable = F.silu,
                    weight_on_input: bool = False) -> torch.Tensor:
    """The routed experts of an MoE block, all steps apart; gradients reach every argument.

    hidden_states: [tokens, H]. gate_up_proj: [E, 2I, H], gates first; down_proj: [E, H, I]. topk_weights, topk_ids:
    [tokens, topk]. weight_on_input: the weights multiply the experts' input (Llama-4), not their output. Returns
    [tokens, H].
    """
    num_tokens, topk = topk_ids.shape
    m_sizes, gather_indices = get_routing_indices(topk_ids, gate_up_proj.shape[0])
    weights = topk_weights.to(hidden_states.dtype).reshape(-1, 1)
    x = permute(hidden_states, gather_indices, topk)
    if weight_on_input:
        x = x * weights[gather_indices.long()]
    gate, up = torch_grouped_gemm(x, gate_up_proj, m_sizes).chunk(2, dim=-1)
    y = unpermute(torch_grouped_gemm(act_fn(gate) * up, down_proj, m_sizes), gather_indices)
    if not weight_on_input:
        y = y * weights
    return y.view(num_tokens, topk, -1).sum(1)
