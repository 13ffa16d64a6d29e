"""The linear layer that scores experts, which Transformers takes for a router of its own."""
from __future__ import annotations

import functools
import sys

import torch
from torch import nn

__all__ = ["Router"]


class Router(nn.Linear):
    """[tokens, H] -> the router's logits, [tokens, E].

    Transformers records logits (output_router_logits, the auxiliary loss) by hooks on all instances of its router's class, and
    says nothing where it finds none. So a router of ours is an instance of that class as well: of hf_router, such as
    "mixtral.MixtralTopKRouter", if its module is loaded by now, or of the class of the router whose place it takes.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, hf_router: str, bias: bool = False, device=None,
                 dtype: torch.dtype | None = None):
        super().__init__(hidden_size, num_experts, bias=bias, device=device, dtype=dtype)
        family, name = hf_router.split(".")
        theirs = getattr(sys.modules.get(f"transformers.models.{family}.modeling_{family}"), name, None)
        if theirs is not None:
            self.__class__ = _both(type(self), theirs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)

    def take_place_of(self, router: nn.Module) -> None:
        """Becomes an instance of its class, with the hooks of Transformers that record its logits already."""
        self.__class__ = _both(getattr(self, "_ours", type(self)), type(router))
        self._forward_hooks.update((key, hook) for key, hook in router._forward_hooks.items()
                                   if (getattr(hook, "__module__", None) or "").startswith("transformers."))


@functools.cache
def _both(ours: type[Router], theirs: type[nn.Module]) -> type[Router]:
    """A class of ours that is a subclass of theirs; its instances are pickled by these two."""
    return type(ours.__name__, (ours, theirs), {
        "__module__": ours.__module__, "__doc__": ours.__doc__, "_ours": ours,
        "__reduce__": lambda self: (_new_of_both, (ours, theirs), self.__dict__)})


def _new_of_both(ours: type[Router], theirs: type[nn.Module]) -> Router:
    both = _both(ours, theirs)
    return both.__new__(both)
