"""The MoE blocks of published model families: sizes, routing, weights, and what they compute."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..ops.block.fused_moe import Fusions, SharedExpert, fused_moe
from ..ops.routing.route import route
from ..plan.formats import Checkpoint
from ..quantized.weight import QuantizedWeight
from .checkpoint import as_in_checkpoint
from .workloads import MODELS, Model

_MULTIPLE = 64


@dataclass(frozen=True)
class Family:
    """What tells one family's block from another's; the arguments of `fused_moe` and `route` have their meaning there.

    shared_intermediate_size: of the shared expert, 0 without one. transposed: weights are [E, K, N] instead of [E, N, K].
    float_weights: the router's weights stay float32; others are rounded to the hidden states' dtype, as in Transformers.
    """
    model: Model
    routing: dict = field(hash=False)
    float_weights: bool = False
    shared_intermediate_size: int = 0
    activation: str = "silu"
    alpha: float = 1.702
    limit: float | None = None
    interleaved: bool = False
    bias: bool = False
    transposed: bool = False
    weight_on_input: bool = False

    def num_weights(self) -> int:
        """Elements of all experts, the shared one included; biases are left out."""
        model = self.model
        return 3 * model.hidden_size * (model.num_experts * model.intermediate_size + self.shared_intermediate_size)

    def flops(self, tokens: int) -> int:
        """Operations of the matrix products for this many tokens."""
        model = self.model
        return 6 * model.hidden_size * tokens * (model.top_k * model.intermediate_size + self.shared_intermediate_size)

    def least_bytes(self, tokens: int, active_experts: int, itemsize: int, weight_bytes: float | None = None) -> int:
        """Bytes to move at least: weights of experts that have rows, hidden states in, output out. weight_bytes: of one weight of routed
        experts, by default itemsize."""
        model = self.model
        routed = active_experts * model.intermediate_size * (weight_bytes or itemsize)
        return round((3 * (routed + self.shared_intermediate_size * itemsize) + 2 * tokens * itemsize) * model.hidden_size)


FAMILIES = {
    "qwen3": Family(MODELS["qwen3-30b-a3b"], dict(renormalize=True)),
    "llama4": Family(Model("llama-4-scout", 5120, 8192, 16, 1), dict(scoring="sigmoid"), shared_intermediate_size=8192,
                     transposed=True, weight_on_input=True),
    "gpt-oss": Family(MODELS["gpt-oss-20b"], dict(scoring="topk_softmax"), activation="swiglu_oai", limit=7.0,
                      interleaved=True, bias=True, transposed=True),
    "deepseek": Family(MODELS["deepseek-v3"], float_weights=True, shared_intermediate_size=2048,
                       routing=dict(scoring="sigmoid", num_groups=8, topk_groups=4, renormalize=True, scaling_factor=2.5)),
    "mixtral": Family(MODELS["mixtral-8x7b"], dict(renormalize=True), float_weights=True),
}


def scaled(family: Family, factor: float) -> Family:
    """The family with hidden and intermediate sizes (the shared expert's too) divided by `factor`, each then the nearest
    multiple of 64 and at least 64. Experts and top-k stay.
    """
    def divided(size: int) -> int:
        return max(_MULTIPLE, _MULTIPLE * round(size / factor / _MULTIPLE)) if size else 0

    model = replace(family.model, hidden_size=divided(family.model.hidden_size),
                    intermediate_size=divided(family.model.intermediate_size))
    return replace(family, model=model, shared_intermediate_size=divided(family.shared_intermediate_size))


@dataclass(frozen=True)
class Weights:
    """w13: [E, 2I, H], w2: [E, H, I], or, for a transposed family, [E, H, 2I] and [E, I, H]; b13: [E, 2I], b2: [E, H].

    Parameters, so that Transformers' modules take these very tensors, and gradients are theirs; or quantised, for moe_xe alone.
    int8_rows: moe_xe quantises rows of activations, too.
    """
    w13: nn.Parameter | QuantizedWeight
    w2: nn.Parameter | QuantizedWeight
    b13: nn.Parameter | None
    b2: nn.Parameter | None
    shared: SharedExpert | None
    int8_rows: bool = False


@dataclass(frozen=True)
class Inputs:
    """hidden_states: [T, H]; topk_weights, topk_ids (int64): [T, k]."""
    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def make_weights(family: Family, dtype: torch.dtype, device: torch.device, training: bool = False) -> Weights:
    """Random weights of a size that keeps values near one; training: they want gradients."""
    model = family.model

    def parameter(*shape: int, scale: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, dtype=dtype, device=device).mul_(scale), requires_grad=training)

    def linear(n: int, k: int, *experts: int, transposed: bool = False) -> nn.Parameter:
        return parameter(*experts, *((k, n) if transposed else (n, k)), scale=k**-0.5)

    def bias(n: int) -> nn.Parameter | None:
        return parameter(model.num_experts, n) if family.bias else None

    (n13, k13), (n2, k2) = model.gemms()
    hidden_size, shared_size = model.hidden_size, family.shared_intermediate_size
    shared = SharedExpert(up_proj=linear(shared_size, hidden_size), down_proj=linear(hidden_size, shared_size),
                          gate_proj=linear(shared_size, hidden_size)) if shared_size else None
    return Weights(linear(n13, k13, model.num_experts, transposed=family.transposed),
                   linear(n2, k2, model.num_experts, transposed=family.transposed), bias(n13), bias(n2), shared)


def quantised(family: Family, weights: Weights, checkpoint: Checkpoint) -> tuple[Weights, Weights]:
    """The weights as such a checkpoint would have them, biases and a shared expert as they are; and the same numbers as dense weights."""
    def quantise(w: torch.Tensor) -> QuantizedWeight:
        logical = w.detach().transpose(1, 2).contiguous() if family.transposed else w.detach()
        found = as_in_checkpoint(logical, checkpoint)
        return found.mT if family.transposed else found

    codes = {name: quantise(getattr(weights, name)) for name in ("w13", "w2")}
    dense = {name: nn.Parameter(w.dequantize(weights.w13.dtype).contiguous(), requires_grad=False) for name, w in codes.items()}
    return replace(weights, **codes, int8_rows=checkpoint.int8_rows), replace(weights, **dense)


def make_inputs(family: Family, tokens: int, dtype: torch.dtype, device: torch.device, training: bool = False) -> Inputs:
    """Random hidden states, and the family's own routing of random logits; training: both want gradients."""
    model = family.model
    logits = torch.randn(tokens, model.num_experts, device=device)
    topk_weights, topk_ids = route(logits, model.top_k, ids_dtype=torch.int64, **family.routing)
    topk_weights = topk_weights if family.float_weights else topk_weights.to(dtype)
    return Inputs(torch.randn(tokens, model.hidden_size, dtype=dtype, device=device, requires_grad=training),
                  topk_weights.requires_grad_(training), topk_ids)


def run_fused(family: Family, weights: Weights, inputs: Inputs, fusions: Fusions | None = None, autotune: bool = False,
              y_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The block as moe_xe computes it: [T, H]."""
    return fused_moe(inputs.hidden_states, weights.w13, weights.w2, inputs.topk_weights, inputs.topk_ids,
                     activation=family.activation, interleaved=family.interleaved, alpha=family.alpha, limit=family.limit,
                     b13=weights.b13, b2=weights.b2, shared=weights.shared, weight_on_input=family.weight_on_input,
                     weight_layout="ekn" if family.transposed else "enk", fusions=fusions, autotune=autotune, y_dtype=y_dtype,
                     activations="int8" if weights.int8_rows else None)


def reference(family: Family, weights: Weights, inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
    """Rows `tokens` of the block's output, [len(tokens), H], in float32 (float64 for float32 inputs) on the CPU."""
    x, factors = (wide(tensor.detach()[tokens], inputs) for tensor in (inputs.hidden_states, inputs.topk_weights))
    return reference_of(family, weights, x, factors, inputs.topk_ids[tokens].cpu())


def wide(tensor: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """On the CPU, in the type of references for these inputs."""
    return tensor.detach().cpu().to(torch.float64 if inputs.hidden_states.dtype == torch.float32 else torch.float32)


def reference_of(family: Family, weights: Weights, x: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The output for tokens [n, H] with weights and ids [n, k], all on the CPU, in x's type; differentiable in these."""
    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().to(x.dtype)

    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        parameters = {name: wide(tensor[expert]) for name, tensor in experts_parameters(weights).items()}
        out.index_add_(0, rows, reference_of_expert(family, x[rows], factors[rows, slots, None], **parameters))
    if weights.shared is not None:
        gate, up, down = (wide(w) for w in (weights.shared.gate_proj, weights.shared.up_proj, weights.shared.down_proj))
        out += _gated(family, x @ gate.T, x @ up.T) @ down.T
    return out


def experts_parameters(weights: Weights) -> dict[str, nn.Parameter]:
    """Those that the routed experts have, by name."""
    named = {"w13": weights.w13, "w2": weights.w2, "b13": weights.b13, "b2": weights.b2}
    return {name: parameter for name, parameter in named.items() if parameter is not None}


def reference_of_expert(family: Family, x: torch.Tensor, factor: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor,
                        b13: torch.Tensor | None = None, b2: torch.Tensor | None = None) -> torch.Tensor:
    """One expert's share for rows [n, H] with factors [n, 1]."""
    if not family.transposed:
        w13, w2 = w13.T, w2.T
    h = (x * factor if family.weight_on_input else x) @ w13
    h = h if b13 is None else h + b13
    y = _gated(family, *((h[:, 0::2], h[:, 1::2]) if family.interleaved else h.chunk(2, 1))) @ w2
    y = y if b2 is None else y + b2
    return y if family.weight_on_input else y * factor


def _gated(family: Family, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if family.activation == "silu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=family.limit), up.clamp(-family.limit, family.limit)
    return gate * (family.alpha * gate).sigmoid() * (up + 1)
