"""The activations of the MoE block with torch's own operations: what the GEMM's epilogue computes, unfused."""
from __future__ import annotations

import torch

from ...plan.problem import Activation, ActivationKind

__all__ = ["apply_activation"]


def apply_activation(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[..., N] -> [..., N/2] if gated, else [..., N]; computed in float32 (float64 stays), returned in x's dtype."""
    values = x.double() if x.dtype == torch.float64 else x.float()
    up = None
    if activation.gated:
        gate, up = (values[..., 0::2], values[..., 1::2]) if activation.interleaved else values.chunk(2, dim=-1)
    else:
        gate = values
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = None if up is None else up.clamp(-activation.limit, activation.limit)
    kind = activation.kind
    if kind is ActivationKind.silu:
        result = torch.nn.functional.silu(gate)
    elif kind is ActivationKind.gelu:
        result = torch.nn.functional.gelu(gate)
    elif kind is ActivationKind.gelu_tanh:
        result = torch.nn.functional.gelu(gate, approximate="tanh")
    elif kind is ActivationKind.relu2:
        result = gate.relu().square()
    else:
        result = gate * torch.sigmoid(activation.alpha * gate)
        up = None if up is None else up + 1
    return (result if up is None else result * up).to(x.dtype)
