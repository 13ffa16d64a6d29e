"""The gate of experts in Transformers' layout: what stands between the two projections, and which activation of `fused_moe` it is."""
from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from torch import nn

from ..quantized.weight import QuantizedWeight
from .activations import recognise
from .quantized import QuantizedParameter, weight_of

__all__ = ["first_projection", "fused_activation", "own_gate"]

Fused = tuple[str, float, float | None]      # activation, alpha and limit of fused_moe


def first_projection(experts: nn.Module) -> str:
    """The name of the first weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def own_gate(experts: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module itself makes of its first projection's results, [rows, N]."""
    return experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)


def fused_activation(experts: nn.Module) -> Fused | None:
    """(activation, alpha, limit) of `fused_moe` that equal the experts' own gate, or None.

    Found by trying what the gate computes; alpha and limit are among the attributes with such names. A gate that has tensors
    of its own, reads the configuration or raises is None, and so are experts with a norm behind them. The answer holds until an
    attribute of the module changes, or one of what is below it, such as act_fn. To torch.compile it is a constant, guarded by
    all that the gate reads.
    """
    if getattr(experts, "has_post_expert_norm", False):
        return None
    if torch.compiler.is_dynamo_compiling():
        weights = weight_of(experts, first_projection(experts))
        dtype = torch.get_default_dtype() if isinstance(weights, QuantizedWeight) else weights.dtype
        with torch.no_grad():      # traced for its guards; the result is not used
            own_gate(experts, torch.empty(1, weights.shape[2 if experts.is_transposed else 1], dtype=dtype, device=weights.device))
    return _known_activation(experts)


class _Known(NamedTuple):
    state: list
    objects: list[weakref.ref]
    owners: list[_Owner]
    activation: Fused | None

    def is_unchanged(self, experts: nn.Module) -> bool:
        """Whether all is what it was. The state keeps what has no weak reference alive, so that nothing else gets its id."""
        return (self.state[0] is _own_gate_function(experts) and all(owner.is_unchanged() for owner in self.owners) and
                all(reference() is not None for reference in self.objects))


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _known_activation(experts: nn.Module) -> Fused | None:
    known = _known.get(experts)
    if known is not None and known.is_unchanged(experts):
        return known.activation
    dependencies = _Dependencies(experts)
    if known is not None and known.state == dependencies.state and all(reference() is not None for reference in known.objects):
        activation = known.activation
    else:
        activation = None if dependencies.has_tensors else _find_activation(experts)
    _known[experts] = _Known(dependencies.state, dependencies.objects, dependencies.owners, activation)
    return activation


def _find_activation(experts: nn.Module) -> Fused | None:
    tried = object.__new__(type(experts))       # not copy.copy: FSDP's classes call the constructor
    vars(tried).update(vars(experts))
    vars(tried).pop("config", None)
    try:
        found = recognise(lambda x: own_gate(tried, x), gated=experts.has_gate, interleaved=not experts.is_concatenated,
                          alphas=_numbers(experts, "alpha"), limits=_numbers(experts, "limit"))
    except Exception:      # it runs as it is then, and says itself what is wrong
        return None
    return found and (found.kind.value, found.alpha, found.limit)


def _numbers(module: nn.Module, suffix: str) -> list[float]:
    """The positive, finite numbers among the attributes whose names end so."""
    return [float(value) for name, value in vars(module).items()
            if name.endswith(suffix) and isinstance(value, (int, float)) and 0 < value < math.inf]


_EXPERT_TENSORS = {f"{name}{part}" for name in ("gate_up_proj", "up_proj", "down_proj")
                   for part in ("", "_bias", "_scale_inv", "_activation_scale")}
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training", "_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"}


_TENSORS = "_parameters", "_buffers"


def _own_gate_function(experts: nn.Module):
    return type(experts)._apply_gate if experts.has_gate else None


def _items(container: list | tuple | dict) -> tuple:
    return tuple(container) if not isinstance(container, dict) else (*container, *container.values())


class _Owner:
    """Which objects the attributes of one object are, and which the items of these; not the objects' values."""

    def __init__(self, owner):
        attributes = vars(owner)
        self._owner, self._names, self._ids = weakref.ref(owner), tuple(attributes), tuple(map(id, attributes.values()))
        containers = {name: _items(value) for name, value in attributes.items()
                      if isinstance(value, (list, tuple, dict)) and name not in _OF_EVERY_MODULE and name not in _TENSORS}
        self._containers = [(name, tuple(map(id, items))) for name, items in containers.items()]
        self._tensors = [(name, _named(attributes[name])) for name in _TENSORS if name in attributes]
        self._is_flat = not any(isinstance(item, (list, tuple, dict)) for items in containers.values() for item in items)

    def is_unchanged(self) -> bool:
        owner = self._owner()
        if owner is None or not self._is_flat:
            return False
        attributes = vars(owner)
        return (tuple(attributes) == self._names and tuple(map(id, attributes.values())) == self._ids and
                all(tuple(map(id, _items(attributes[name]))) == ids for name, ids in self._containers) and
                all(_named(attributes[name]) == names for name, names in self._tensors))


def _named(tensors: dict) -> list[str]:
    """The names under which there is one."""
    return [name for name, tensor in tensors.items() if tensor is not None]


class _Dependencies:
    """What a gate may depend on: the experts' attributes, and all that is below act_fn and their other modules.

    state: plain values, and the ids of other objects. objects: these objects, weakly; the id of one that is gone may be
    another's. owners: whose attributes they are. has_tensors: whether there are others than the experts' weights and biases.
    """

    def __init__(self, experts: nn.Module):
        self.state, self.objects, self.owners, self.has_tensors = [_own_gate_function(experts)], [], [], False
        self._seen = {id(experts)}
        self._add_attributes(experts, _EXPERT_TENSORS, deep=False)
        self.state.append(self.has_tensors)

    def _add_attributes(self, owner, known_tensors: set[str], deep: bool) -> None:
        if not hasattr(owner, "__dict__"):
            return
        self.owners.append(_Owner(owner))
        for name, value in vars(owner).items():
            if name in _TENSORS:
                self.has_tensors |= any(tensor is not None and key not in known_tensors for key, tensor in value.items())
            elif name not in _OF_EVERY_MODULE:
                self.state.append(name)
                self._add(value, deep or name in ("_modules", "act_fn"))

    def _add(self, value, deep: bool) -> None:
        if value is None or isinstance(value, (int, float, str)):
            self.state.append(value)
        elif isinstance(value, torch.Tensor):
            self.has_tensors = True
        elif isinstance(value, QuantizedParameter):
            pass        # a weight
        elif isinstance(value, (list, tuple, dict)):
            self.state.append(len(value))
            for item in value if not isinstance(value, dict) else (*value, *value.values()):
                self._add(item, deep)
        else:
            self._add_object(value, deep)

    def _add_object(self, value, deep: bool) -> None:
        try:
            self.objects.append(weakref.ref(value))
        except TypeError:      # of a type without weak references
            self.state.append(value)
            return
        self.state.append(id(value))
        if deep and id(value) not in self._seen:
            self._seen.add(id(value))
            self._add_attributes(value, set(), deep)
