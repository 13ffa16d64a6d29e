"""What the families' blocks are made of."""
from __future__ import annotations

import torch
from torch import nn

from ..ops import checks
from ..ops.block.call import activations_of
from ..ops.block.fused_moe import SharedExpert, fused_moe
from ..plan.choice.block_config import MoeConfig
from ..quantized.weight import QuantizedWeight
from .activations import activation_name
from .quantized import check_takes_place, set_weight, weight_of
from .sharded import block_op
from .router import Router

__all__ = ["Experts", "GatedMLP", "MoeBlock", "activation_of", "sizes_of"]

_PROJECTIONS = "gate_up_proj", "down_proj"


class Experts(nn.Module):
    """The routed experts' weights, and their MLPs as one `fused_moe`.

    gate_up_proj: [E, 2I, H], down_proj: [E, H, I]; if transposed, [E, H, 2I] and [E, I, H]. bias: adds gate_up_proj_bias
    [E, 2I] and down_proj_bias [E, H]. Both weights may be quantised: `quantize` and `set_quantized`. activation, alpha, limit, interleaved,
    weight_on_input, y_dtype, activations, config, autotune: as in `fused_moe`.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, *, activation: str = "silu",
                 alpha: float = 1.702, limit: float | None = None, interleaved: bool = False, transposed: bool = False,
                 bias: bool = False, weight_on_input: bool = False, y_dtype: torch.dtype | None = None,
                 activations: str | None = None, config: MoeConfig | None = None, autotune: bool = False, device=None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        if dtype is not None:
            checks.check_dtype("dtype", dtype)
        self.activation, self.alpha, self.limit, self.interleaved = activation, alpha, limit, interleaved
        self.transposed, self.weight_on_input = transposed, weight_on_input
        activations_of(activations)
        self.y_dtype, self.activations, self.config, self.autotune = y_dtype, activations, config, autotune
        self.exchange: dict = {}        # what `ExpertParallel` says

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def projection(n, k):
            return parameter(num_experts, k, n) if transposed else parameter(num_experts, n, k)

        self.gate_up_proj = projection(2 * intermediate_size, hidden_size)
        self.down_proj = projection(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(num_experts, 2 * intermediate_size) if bias else None
        self.down_proj_bias = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        for name in _PROJECTIONS:
            if isinstance(w := weight_of(self, name), QuantizedWeight):
                raise TypeError(f"{name} must be dense to be initialised, got {w}")
            nn.init.normal_(w, std=std)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def quantize(self, format: str, group: tuple[int, int] | None = None, **options) -> Experts:
        """Replaces both weights by quantised ones, as `QuantizedWeight.quantize` makes them of [E, N, K] with these arguments; biases stay.
        Returns the module. ValueError where a weight is quantised already."""
        weights = []
        for name in _PROJECTIONS:
            w = weight_of(self, name)
            if isinstance(w, QuantizedWeight):
                raise ValueError(f"{name} must be dense, got {w}")
            logical = w.detach().transpose(1, 2).contiguous() if self.transposed else w.detach()
            weight = QuantizedWeight.quantize(logical, format, group, **options)
            weights.append(weight.mT if self.transposed else weight)
        return self.set_quantized(*weights)

    def set_quantized(self, gate_up_proj: QuantizedWeight | None = None, down_proj: QuantizedWeight | None = None) -> Experts:
        """Puts quantised weights in the place of those that are there, of the same shapes (if transposed, `mT` of [E, N, K]). Returns the
        module, which an error leaves as it was."""
        given = {name: weight for name, weight in zip(_PROJECTIONS, (gate_up_proj, down_proj)) if weight is not None}
        for name, weight in given.items():
            check_takes_place(self, name, weight)
        for name, weight in given.items():
            set_weight(self, name, weight)
        return self

    def forward(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
                shared: SharedExpert | None = None) -> torch.Tensor:
        """[T, H] -> [T, H]; topk_weights and topk_ids: [T, k]."""
        weights = [weight_of(self, name) for name in _PROJECTIONS]
        for name, weight in zip(_PROJECTIONS, weights):
            checks.check_weight_type(f"experts.{name}", weight)
        return block_op(fused_moe, self, weights[0])(
            hidden_states, *weights, topk_weights, topk_ids, activation=self.activation,
            interleaved=self.interleaved, alpha=self.alpha, limit=self.limit, b13=self.gate_up_proj_bias,
            b2=self.down_proj_bias, shared=shared, weight_on_input=self.weight_on_input,
            weight_layout="ekn" if self.transposed else "enk", y_dtype=self.y_dtype,
            activations=self.activations, config=self.config, autotune=self.autotune)


class GatedMLP(nn.Module):
    """The weights of a shared expert, which runs in the launches of the routed ones."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        options = dict(bias=False, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def as_shared_expert(self) -> SharedExpert:
        return SharedExpert(self.up_proj.weight, self.down_proj.weight, self.gate_proj.weight)


class MoeBlock(nn.Module):
    """A family's block. hf_class: the Transformers class whose state dict, inputs and outputs it has; hf_router: that of its
    router, behind the family's name.

    config, autotune, of every family's constructor: as in `fused_moe`.
    """
    hf_class: str
    hf_router: str

    @classmethod
    def from_hf(cls, module: nn.Module, *, config: MoeConfig | None = None, autotune: bool = False) -> MoeBlock:
        """The block with the parameters and buffers of Transformers' (the same objects, nothing is copied).

        config, autotune: as in `fused_moe`.

        Raises TypeError if the module is not laid out as hf_class, ValueError if its activation is not one of moe_xe's.
        """
        try:
            block = cls(**cls.numbers_of(module), config=config, autotune=autotune, device="meta")
        except AttributeError as error:
            raise TypeError(f"module must be laid out as Transformers' {cls.hf_class}, got {type(module).__name__}: "
                            f"{error}") from error
        ours, theirs = _tensors(block), _tensors(module)
        expected, shapes = _shapes(ours), _shapes(theirs)
        if shapes != expected:
            raise TypeError(f"module must hold the tensors of Transformers' {cls.hf_class}, {expected}; "
                            f"{type(module).__name__} holds {shapes}")
        for name, tensor in theirs.items():
            owner, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(owner), attribute, tensor)
        for name, child in block.named_children():
            if isinstance(child, Router):
                child.take_place_of(getattr(module, name))
        return block.train(module.training)

    @staticmethod
    def numbers_of(module: nn.Module) -> dict:
        """The arguments of the constructor that fit Transformers' module."""
        raise NotImplementedError


def sizes_of(experts: nn.Module, transposed: bool = False) -> dict[str, int]:
    """num_experts, hidden_size and intermediate_size of a Transformers experts module."""
    num_experts, *sizes = experts.down_proj.shape
    intermediate_size, hidden_size = sizes if transposed else reversed(sizes)
    return dict(num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size)


def activation_of(experts: nn.Module) -> str:
    return activation_name(experts.act_fn, "experts.act_fn")


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
