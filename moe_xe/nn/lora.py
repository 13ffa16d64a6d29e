"""Low-rank adapters (LoRA) on the weights of frozen experts, with the state dicts of PEFT's `target_parameters`."""
from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..ops import checks
from ..ops.lora.lora_moe import LoraAdapter, lora_moe
from ..plan.choice.block_config import MoeConfig
from ..quantized.weight import QuantizedWeight
from .gates import first_projection, fused_activation
from .parts import Experts
from .quantized import weight_of
from .sharded import block_op

__all__ = ["LoraExperts"]


class LoraExperts(nn.Module):
    """Experts whose weights stay as they are, while a low-rank adapter for each is trained.

    experts: `moe_xe.nn.Experts`, or a module under Transformers' use_experts_implementation. It becomes base_layer, and its
    parameters no longer require gradients. Its forward is not called: `lora_moe` computes experts and adapters.
    r, lora_alpha, use_rslora: an adapter is multiplied with lora_alpha / r, or lora_alpha / sqrt(r).
    target_parameters: which of the experts' weights have one; all by default.
    config, autotune: as in `lora_moe`; by default those of `moe_xe.nn.Experts`. dtype: of the adapters, the weights' by default, of quantised
    weights torch's default dtype.

    lora_A: [E, r, in] and lora_B: [E, out, r] by name of the weights. As in PEFT, A is uniform within 1 / sqrt(in) and B
    zero at first, so that the module begins as the experts it wraps.

    Its state dict is that of the experts, under their own names, and lora_A.* and lora_B.* beside it. So what is saved of a model
    loads into one with the experts alone, without the adapters, and into one with LoraExperts.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, experts: nn.Module, r: int = 8, lora_alpha: float = 8, *, use_rslora: bool = False,
                 target_parameters: Collection[str] | None = None, config: MoeConfig | None = None, autotune: bool = False,
                 dtype: torch.dtype | None = None):
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a positive int, got {r!r}")
        self._routing_first, self._first = isinstance(experts, Experts), _first_of(experts)
        _check_weights(experts, self._first)
        transposed = _options_of(experts)["weight_layout"] == "ekn"
        self.config, self.autotune = config, autotune
        if isinstance(experts, Experts) and config is None and not autotune:
            self.config, self.autotune = experts.config, experts.autotune
        names = [name for name, _ in (*experts.named_parameters(recurse=False), *experts.named_children())]
        weights = [name for name in names if name in (self._first, "down_proj")]
        targets = weights if target_parameters is None else [name for name in weights if name in target_parameters]
        if not targets or (target_parameters is not None and set(target_parameters) != set(targets)):
            raise ValueError(f"target_parameters must be some of {weights}, got {target_parameters!r}")
        self.base_layer = experts.requires_grad_(False)
        self.r, self.lora_alpha = r, lora_alpha
        self.exchange: dict = {}        # what `ExpertParallel` says
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name in targets:
            w = weight_of(experts, name)
            num_experts, n, k = (w.transpose(1, 2) if transposed else w).shape
            own = torch.get_default_dtype() if isinstance(w, QuantizedWeight) else w.dtype
            for adapters, shape in ((self.lora_A, (num_experts, r, k)), (self.lora_B, (num_experts, n, r))):
                adapters[name] = nn.Parameter(torch.empty(shape, device=w.device, dtype=dtype or own))
        self.register_state_dict_post_hook(_base_layer_left_out)
        self.register_load_state_dict_pre_hook(_base_layer_put_in)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, a in self.lora_A.items():
            nn.init.uniform_(a, -a.shape[2]**-0.5, a.shape[2]**-0.5)
            nn.init.zeros_(self.lora_B[name])

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor, shared=None) -> torch.Tensor:
        """[T, H] -> [T, H]. routing: as the wrapped module takes it, topk_weights and topk_ids [T, k] for
        `moe_xe.nn.Experts`, top_k_index and top_k_weights for Transformers'."""
        topk_weights, topk_ids = routing if self._routing_first else reversed(routing)
        base, adapters = self.base_layer, self.adapters()
        _check_weights(base, self._first)
        w13, w2 = weight_of(base, self._first), weight_of(base, "down_proj")
        return block_op(lora_moe, self, w13)(
            hidden_states, w13, w2, topk_weights, topk_ids, lora13=adapters.get(self._first),
            lora2=adapters.get("down_proj"), b13=getattr(base, f"{self._first}_bias", None),
            b2=getattr(base, "down_proj_bias", None), shared=shared, config=self.config, autotune=self.autotune, **_options_of(base))

    def adapters(self) -> dict[str, LoraAdapter]:
        return {name: LoraAdapter(a, self.lora_B[name], self.scaling) for name, a in self.lora_A.items()}

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the adapters to the weights of the wrapped experts, and returns these: ``block.experts = block.experts.merge()``.
        The adapters start anew. TypeError for quantised weights."""
        transposed = _options_of(self.base_layer)["weight_layout"] == "ekn"
        weights = {name: weight_of(self.base_layer, name) for name in self.lora_A}
        for name, w in weights.items():
            if isinstance(w, QuantizedWeight):
                raise TypeError(f"{name} must be dense to be merged into, as sums are no whole steps of a scale; got {w}")
        for name, adapter in self.adapters().items():
            w = weights[name]
            delta = adapter.scaling * (adapter.b.float() @ adapter.a.float())
            w.copy_(w.float() + (delta.transpose(1, 2) if transposed else delta))
        self.reset_parameters()
        return self.base_layer

    def peft_state_dict(self, prefix: str = "", adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """Copies of the adapters under PEFT's names and in its layouts (0.21's).

        prefix: of the module in PEFT's model, such as "base_model.model.model.layers.0.mlp.experts.". adapter_name: None for
        the keys of adapter files and get_peft_model_state_dict; a loaded model's own keys have one, "default" mostly.
        """
        items = self._peft_items(prefix, adapter_name)
        return {key: _to_peft(kind, parameter).detach().clone() for key, kind, parameter in items}

    @torch.no_grad()
    def load_peft_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str = "",
                             adapter_name: str | None = None) -> None:
        """Takes the adapters from PEFT's state dict; other keys in it are left alone. lora_alpha and r are the constructor's.

        ValueError for a key that is missing, or a shape that is not PEFT's for these experts and this r.
        """
        items = list(self._peft_items(prefix, adapter_name))
        for key, kind, parameter in items:      # all of them, before anything is changed
            expected = tuple(_to_peft(kind, parameter).shape)
            if key not in state_dict:
                raise ValueError(f"state_dict must have the key {key!r}, it has {sorted(state_dict)[:8]}")
            if tuple(state_dict[key].shape) != expected:
                raise ValueError(f"state_dict[{key!r}] must be {list(expected)}, got {list(state_dict[key].shape)}")
        for key, kind, parameter in items:
            parameter.copy_(_from_peft(kind, state_dict[key], len(parameter)))

    def _peft_items(self, prefix: str, adapter_name: str | None):
        """Key, "lora_A" or "lora_B", and parameter. PEFT wraps the module once for each weight, in the module's order: the
        last one's adapter is outermost."""
        names, suffix = list(self.lora_A), "weight" if adapter_name is None else f"{adapter_name}.weight"
        for depth, name in enumerate(reversed(names)):
            for kind in ("lora_A", "lora_B"):
                yield f"{prefix}{'base_layer.' * depth}{kind}.{suffix}", kind, getattr(self, kind)[name]

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}"


def _to_peft(kind: str, parameter: torch.Tensor) -> torch.Tensor:
    """The weights of two linear layers around all experts' ranks: A is [E * r, in], expert by expert; B is [out, r * E],
    each rank's experts beside each other."""
    return parameter.flatten(0, 1) if kind == "lora_A" else parameter.permute(1, 2, 0).flatten(1)


def _from_peft(kind: str, weight: torch.Tensor, num_experts: int) -> torch.Tensor:
    return weight.unflatten(0, (num_experts, -1)) if kind == "lora_A" else weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


_PREFIX = "base_layer."


def _base_layer_left_out(module, state_dict, prefix, local_metadata) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + _PREFIX)]:
        state_dict[prefix + key.removeprefix(prefix + _PREFIX)] = state_dict.pop(key)


def _base_layer_put_in(module, state_dict, prefix, *_) -> None:
    for key in module.base_layer.state_dict(keep_vars=True):
        if prefix + key in state_dict:
            state_dict[prefix + _PREFIX + key] = state_dict.pop(prefix + key)


def _check_weights(experts: nn.Module, first: str) -> None:
    for name in (first, "down_proj"):
        checks.check_weight_type(f"experts.{name}", weight_of(experts, name))


def _first_of(experts: nn.Module) -> str:
    if isinstance(experts, Experts):
        return "gate_up_proj"
    if isinstance(experts, nn.Module) and hasattr(experts, "is_concatenated") and hasattr(experts, "down_proj"):
        return first_projection(experts)
    raise TypeError(f"experts must be moe_xe.nn.Experts or a module under Transformers' use_experts_implementation, "
                    f"got {type(experts).__name__}")


def _options_of(experts: nn.Module) -> dict:
    """What `lora_moe` is to compute for them, as they are now."""
    if isinstance(experts, Experts):
        options = {name: getattr(experts, name) for name in ("activation", "alpha", "limit", "interleaved", "weight_on_input", "y_dtype")}
        transposed = experts.transposed
    else:
        fused, transposed = fused_activation(experts), experts.is_transposed
        if fused is None:
            raise ValueError(f"experts must have one of fused_moe's activations and nothing behind it, got {experts}")
        options = dict(zip(("activation", "alpha", "limit"), fused), interleaved=not experts.is_concatenated)
    return options | {"weight_layout": "ekn" if transposed else "enk"}
