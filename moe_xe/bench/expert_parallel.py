"""Dispatch, combine and the whole block with experts on several ranks, against torch's own ways, in processes of one host."""
from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ..distributed import combine, dispatch, expert_parallel_moe
from . import plain_exchange
from .block_models import Family, scaled
from .gemm import DTYPES
from .memory import available_bytes
from .numerics import difference, tolerance
from .sent_bytes import SentBytes
from .slow_link import slow_group
from .workloads import MODELS, Model

PARTS = ("dispatch", "combine", "block")
# `calc_diff` of a block whose rows are sent as codes, there or back: about three times what is seen.
_CODES_DIFFER = {"int8": 1e-3, "fp8_e4m3": 5e-3}


@dataclass(frozen=True)
class Options:
    """What is the same for all cases. delay: milliseconds that a link takes for each MB of a rank's messages, 0 for
    gloo's own time; rounds: of which medians are taken."""
    ranks: int
    device: str = "cpu"
    dtype: str = "bf16"
    scale: float = 1.0
    chunks: int | None = None
    wire: str | None = None
    wire_back: str | None = None
    delay: float = 0.0
    rounds: int = 10


@dataclass(frozen=True)
class Result:
    """One case. tokens: of each rank. *_ms: median milliseconds, of the slowest rank, by part; sent_bytes: by all ranks for a block, there and
    back. plain: torch's. correct: whether the two blocks differ by no more than roundings, or what codes of rows lose."""
    model: str
    tokens: int
    options: Options
    moe_xe_ms: dict[str, float]
    plain_ms: dict[str, float]
    sent_bytes: int
    plain_sent_bytes: int
    correct: bool

    @property
    def speedup(self) -> dict[str, float]:
        return {part: self.plain_ms[part] / self.moe_xe_ms[part] for part in PARTS}

    def as_dict(self) -> dict:
        return {**asdict(self), "speedup": self.speedup}


def check_memory(models: Sequence[str], options: Options) -> None:
    """MemoryError for a model whose weights do not fit; a host's processes share its memory, devices have their own."""
    device = torch.device(options.device)
    available = available_bytes(device) * (options.ranks if device.type == "xpu" else 1)
    for name in models:
        sizes = _scaled(MODELS[name], options.scale)
        needed = 3 * sizes.num_experts * sizes.hidden_size * sizes.intermediate_size * DTYPES[options.dtype].itemsize
        if needed > available:
            raise MemoryError(f"{name}'s experts need {needed / 1e9:.1f} GB at scale {options.scale:g}, and {available / 1e9:.1f} GB are free on "
                              f"{options.device}; --scale 2 makes that a quarter")


def _scaled(model: Model, scale: float) -> Model:
    return scaled(Family(model, {}), scale).model if scale > 1 else model


def run(models: Sequence[str], token_counts: Sequence[int], options: Options) -> list[Result]:
    """In options.ranks processes that it starts. Raises what one of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_on_rank, (folder, models, token_counts, options), nprocs=options.ranks)
        cases = json.loads(Path(folder, "results").read_text())
    return [Result(**case | {"options": options}) for case in cases]


def _on_rank(rank: int, folder: str, models: Sequence[str], token_counts: Sequence[int], options: Options) -> None:
    torch.set_num_threads(max((os.cpu_count() or 1) // options.ranks, 1))
    device = torch.device(options.device, rank if options.device == "xpu" else None)
    if device.type == "xpu":
        torch.xpu.set_device(device)
    backend = "xccl" if device.type == "xpu" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    with torch.inference_mode():
        results = [result for name in models for result in run_model(MODELS[name], token_counts, options, device)]
    if rank == 0:
        Path(folder, "results").write_text(json.dumps([asdict(result) for result in results]))
    dist.barrier()
    dist.destroy_process_group()


def run_model(model: Model, token_counts: Sequence[int], options: Options, device: torch.device) -> list[Result]:
    """On each rank of the default group: the cases of one model, with this rank's part of its weights."""
    group, dtype = slow_group(1e9 / options.delay) if options.delay else dist.group.WORLD, DTYPES[options.dtype]
    sizes = _scaled(model, options.scale)
    torch.manual_seed(group.rank())
    w13, w2 = (torch.randn(model.num_experts // group.size(), n, k, dtype=dtype, device=device).mul_(k**-0.5) for n, k in sizes.gemms())
    results = []
    for tokens in token_counts:
        x = torch.randn(tokens, sizes.hidden_size, dtype=dtype, device=device)
        picked = torch.rand(tokens, model.num_experts, device=device).topk(model.top_k, dim=1)
        inputs = x, w13, w2, picked.values.softmax(1), picked.indices
        ours, plain = _ours(*inputs, model.num_experts, options, group), _plain(*inputs, model.num_experts, group)
        outs, sent = [], []
        for way in (ours, plain):
            with SentBytes(group.rank()) as counted:
                outs.append(way["block"]())
            sent.append(counted.number)
        totals = torch.tensor([*sent, not _agree(*outs, sizes, options)], device=device)
        dist.all_reduce(totals)
        ours_ms, plain_ms = _medians([ours, plain], options.rounds, device)
        results.append(Result(model.name, tokens, options, ours_ms, plain_ms, *totals[:2].tolist(), not totals[2].item()))
    return results


def _ours(x, w13, w2, weights, ids, num_experts: int, options: Options, group) -> dict[str, Callable]:
    wires = {"wire": options.wire, "wire_back": options.wire_back}
    send = functools.partial(dispatch, x, ids, weights, num_experts=num_experts, group=group, **wires)
    found = send()
    return {"dispatch": send, "combine": functools.partial(combine, torch.randn_like(found.x), found.handle),
            "block": functools.partial(expert_parallel_moe, x, w13, w2, weights, ids, group=group, chunks=options.chunks, **wires)}


def _plain(x, w13, w2, weights, ids, num_experts: int, group) -> dict[str, Callable]:
    send = functools.partial(plain_exchange.dispatch, x, ids, num_experts, group)
    found = send()

    def block() -> torch.Tensor:
        found = send()
        return plain_exchange.combine(plain_exchange.experts(found.rows, w13, w2, found.tokens_per_expert), found, weights, group)

    return {"dispatch": send, "combine": functools.partial(plain_exchange.combine, torch.randn_like(found.rows), found, weights, group),
            "block": block}


def _agree(ours: torch.Tensor, plain: torch.Tensor, sizes: Model, options: Options) -> bool:
    found, once = difference(ours.cpu(), plain.cpu()), tolerance(ours.dtype, sizes.intermediate_size)
    codes = [_CODES_DIFFER[wire] for wire in (options.wire, options.wire_back) if wire]
    if codes:
        return found.calc_diff <= sum(codes)
    roundings = 4 + 6 + sizes.top_k     # ours: rows, h, a rank's sum and the result; plain's: whatever it stores, and each expert's part
    return found.max_error <= once.max_error * roundings**0.5 and found.calc_diff <= once.calc_diff * roundings


def _medians(ways: list[dict[str, Callable]], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Milliseconds of each call of each way, in turn; all ranks start together, and the slowest one counts."""
    def timed(call: Callable) -> float:
        _synchronize(device)
        dist.barrier()
        begin = time.perf_counter()
        call()
        _synchronize(device)
        return time.perf_counter() - begin

    times = torch.tensor([[[timed(way[part]) for part in PARTS] for way in ways] for _ in range(rounds + 1)], device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return [{part: 1e3 * statistics.median(times[1:, way, at].tolist()) for at, part in enumerate(PARTS)} for way in range(len(ways))]


def _synchronize(device: torch.device) -> None:
    if device.type == "xpu":
        torch.xpu.synchronize(device)
