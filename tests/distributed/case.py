"""Blocks whose experts and tokens are spread over ranks, against one process in float64."""
from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from moe_xe import LoraAdapter, SharedExpert
from moe_xe.distributed import expert_parallel_moe
from tests.ops.block.case import GRADIENT_LIMITS, assert_close, make, reference

OF_EXPERTS = "w13", "w2", "b13", "b2", "lora13", "lora2"
OF_TOKENS = "hidden_states", "topk_weights", "topk_ids"


def spans(sizes) -> list[range]:
    """sizes, of neighbours."""
    ends = list(accumulate(sizes, initial=0))
    return [range(begin, end) for begin, end in zip(ends, ends[1:])]


def block(tokens, experts, seed: int = 0, dtype=torch.float32, **options) -> dict:
    """Arguments of a block with all ranks' tokens and experts; of each rank, how many tokens, and how many experts or which. One id in ten
    is none."""
    torch.manual_seed(seed)
    number = 1 + max((expert for entry in placed(experts) for expert in entry), default=-1)
    arguments = make(sum(tokens), number, dtype=dtype, **options)
    ids = torch.randint(number, arguments["topk_ids"].shape)
    ids = torch.where(torch.rand(ids.shape) < 0.1, torch.tensor([-1, number])[torch.randint(2, ids.shape)], ids)
    return arguments | {"topk_ids": ids.to(arguments["topk_ids"].dtype)}


def placed(experts) -> list:
    """Global ids of each rank."""
    return list(map(list, spans(experts))) if isinstance(experts[0], int) else experts


def of_rank(arguments: dict, rank: int, tokens, experts) -> dict:
    """A rank's part of them, as tensors of their own."""
    mine, own = spans(tokens)[rank], torch.tensor(placed(experts)[rank], dtype=torch.int64)

    def taken(value):
        if isinstance(value, LoraAdapter):
            return replace(value, a=taken(value.a), b=taken(value.b))
        return tree_map(lambda tensor: tensor[own].clone() if isinstance(tensor, torch.Tensor) else tensor, value)

    result = dict(arguments)
    for name, value in arguments.items():
        if name in OF_EXPERTS:
            result[name] = taken(value)
        elif name in OF_TOKENS:
            result[name] = value[mine.start:mine.stop].clone()
        elif isinstance(value, SharedExpert):
            result[name] = replace(value, **{part: (tensor[mine.start:mine.stop] if part == "weights" else tensor).clone()
                                             for part, tensor in vars(value).items() if tensor is not None})
    return result


def leaves(arguments: dict) -> dict[str, torch.Tensor]:
    """The floating-point tensors by name, which require a gradient from now on."""
    found = {}
    for name, value in arguments.items():
        parts = vars(value) if isinstance(value, (SharedExpert, LoraAdapter)) else {"": value}
        found |= {f"{name}.{part}".rstrip("."): tensor for part, tensor in parts.items()
                  if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()}
    for tensor in found.values():
        tensor.requires_grad_()
    return found


def on_rank(rank: int, arguments: dict, grad: torch.Tensor | None, tokens, experts, options: dict):
    """On one rank: the output, and, for a gradient of it [T of all ranks, H], the gradients by name. Run twice: they are bitwise equal."""
    mine, found = spans(tokens)[rank], []
    for _ in range(2):
        own = of_rank(arguments, rank, tokens, experts)
        inputs = {} if grad is None else leaves(own)
        out = expert_parallel_moe(**own, group=dist.group.WORLD, **options)
        if grad is not None:
            out.backward(grad[mine.start:mine.stop])
        found.append({"out": out.detach()} | {name: tensor.grad for name, tensor in inputs.items()})
    first, second = found
    for name in first:
        assert first[name] is second[name] is None or torch.equal(first[name], second[name]), name
    return first


def expected(arguments: dict, grad: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What all ranks together should give."""
    arguments = {name: value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                 for name, value in arguments.items()}
    for name, value in arguments.items():
        if isinstance(value, (SharedExpert, LoraAdapter)):
            arguments[name] = replace(value, **{part: tensor.detach().double() for part, tensor in vars(value).items()
                                                if isinstance(tensor, torch.Tensor)})
    inputs = {} if grad is None else leaves(arguments)
    plain = dict(arguments)
    for name in ("lora13", "lora2"):
        adapter = plain.pop(name, None)
        if adapter is not None:
            w = name.replace("lora", "w")
            plain[w] = plain[w] + adapter.scaling * adapter.b @ adapter.a
    out = reference(**plain)
    if grad is not None and out.requires_grad:
        out.backward(grad.double())
    gradients = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in inputs.items()}
    return {"out": out.detach()} | gradients


def joined(found: list[dict], experts, num_experts: int) -> dict[str, torch.Tensor]:
    """Of what each rank has: tokens one behind the other, experts by id, with the sum of replicas', all others' sums."""
    result = {}
    for name in found[0]:
        parts = [torch.zeros(0) if part[name] is None else part[name].double() for part in found]
        if name == "out" or name.partition(".")[0] in OF_TOKENS or name == "shared.weights":
            result[name] = torch.cat(parts)
        elif name.partition(".")[0] in OF_EXPERTS:
            shape = max(parts, key=torch.Tensor.numel).shape[1:]
            result[name] = torch.zeros(num_experts, *shape, dtype=torch.float64)
            for part, ids in zip(parts, placed(experts)):
                if ids and part.numel():
                    result[name].index_add_(0, torch.tensor(ids), part)
        else:
            result[name] = sum(parts)
    return result


def check(ranks, arguments: dict, tokens, experts, gradients: bool = True, limits=None, **options) -> list[dict]:
    """One call on all ranks, against one process."""
    x = arguments["hidden_states"]
    grad = torch.randn(x.shape).to(x.dtype) if gradients else None
    if not isinstance(experts[0], int):
        options["experts_of_ranks"] = experts
    found = ranks.run(on_rank, arguments, grad, tokens, experts, options)
    want = expected(arguments, grad)
    got = joined(found, experts, 1 + max(map(max, filter(None, placed(experts)))))
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], limits or GRADIENT_LIMITS[x.dtype], name)
    return found
