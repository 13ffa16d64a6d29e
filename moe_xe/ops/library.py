"""moe_xe's operators for torch: `torch.ops.moe_xe.*`, with a kernel for CPU and XPU tensors and one for fake ones."""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from .calls import repeated

__all__ = ["define", "written_to"]

_library = torch.library.Library("moe_xe", "FRAGMENT")     # lives as long as the process


def define(name: str, schema: str, body: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers ``moe_xe::name`` and returns it. schema: "(arguments) -> results".

    `torch.library.custom_op` does the same through layers of Python that cost more than a small launch. What they check, that no
    result shares memory with an argument, opcheck does in the tests.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.moe_xe, name).default
    written = [place for place, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]
    kernel = repeated(name, body, written)
    kernel = _unseen_by_dynamo(_counting_versions(kernel, written) if written else kernel)
    for key in ("CPU", "XPU"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"moe_xe::{name}", fake, lib=_library)
    return op


def _counting_versions(kernel: Callable, written: list[int]) -> Callable:
    """Tells autograd of what the kernel writes to."""
    @functools.wraps(kernel)
    def counting(*arguments):
        result = kernel(*arguments)
        written_to(arguments[place] for place in written)
        return result

    return counting


def written_to(tensors) -> None:
    """Counts up the versions of tensors, by which autograd notices that a saved one has changed."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _unseen_by_dynamo(kernel: Callable) -> Callable:
    """Not traced where a compiled function calls it. Without dynamo in the process nothing traces, and to load it takes seconds."""
    disabled = torch._disable_dynamo(kernel)

    @functools.wraps(kernel)
    def plain(*arguments):
        return (disabled if "torch._dynamo" in sys.modules else kernel)(*arguments)

    return plain
