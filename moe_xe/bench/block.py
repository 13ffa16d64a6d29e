"""The block of a model's experts, from hidden states and routing to the output, against Transformers' ways to run it."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from ..ops.block.fused_moe import Fusions
from ..plan.formats import CHECKPOINTS
from ..plan.problem import Dtype
from ..timing import interleaved_medians
from . import block_models, block_peers
from .block_gradients import Gradients
from .block_models import Family, Inputs, Weights
from .gemm import DTYPES
from .memory import available_bytes, peak_bytes
from .numerics import difference, tolerance
from .roofline import record_for

_PLAN_DTYPES = {"bf16": Dtype.bf16, "fp16": Dtype.f16, "fp32": Dtype.f32}
MODES = {"forward": 1, "backward": 2, "both": 3}    # and how many times forward's matrix products each has
_INT8_ROUNDINGS = 80    # to bfloat16 that two quantisations of rows are like: of numbers whose largest is five RMS, to steps of a 127th of it
_SAMPLE = 8    # tokens whose outputs are compared with the reference


@dataclass(frozen=True)
class Result:
    """One case. *_ms: median milliseconds, None where a peer was not run; not_run says why.

    weights: "dense", or the name of the routed experts' format; peers, and moe_xe_dense, then have the dequantised numbers.
    mode: "forward", "backward" (of a forward pass that is not timed) or "both", with the gradients of hidden states,
    routing weights and all parameters. rows: routed rows. active_experts: experts that have rows.
    permute_x, permute_y: whether gather and scatter are fused. autotune: whether configurations are the tuner's.
    speedup: the fastest peer's time / moe_xe's. gflops: operations that the mathematics needs, so not what backward
    computes again / time. gbytes_per_s: least bytes (active experts' weights, hidden states in and out; of the gradients,
    those of all weights) / time. roofline: the least time that the device's peaks allow / time, None for a device without
    a record; it can exceed 1 where weights stay in a cache. *_peak_bytes: `memory.peak_bytes` of one call, so without what
    "backward" finds kept. wrong: whose outputs, or gradients, differ from the reference by more than roundings.
    """
    model: str
    weights: str
    mode: str
    device: str
    dtype: str
    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int
    num_experts: int
    top_k: int
    tokens: int
    rows: int
    active_experts: int
    permute_x: bool
    permute_y: bool
    autotune: bool
    moe_xe_ms: float
    moe_xe_dense_ms: float | None
    eager_ms: float | None
    grouped_mm_ms: float | None
    batched_mm_ms: float | None
    not_run: dict[str, str]
    fastest_peer: str
    speedup: float
    gflops: float
    gbytes_per_s: float
    roofline: float | None
    moe_xe_peak_bytes: int
    fastest_peer_peak_bytes: int
    wrong: list[str]

    @property
    def correct(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict:
        return dict(asdict(self), correct=self.correct)


def needed_bytes(family: Family, tokens: int, dtype: torch.dtype, training: bool = False, quantised: bool = False) -> int:
    """About what a case takes: weights, one call's intermediate values in float32, an expert's weights for the reference.

    Weights that are quantised are there before, as codes and dequantised. In training also what each way keeps for backward, one way's gradients, and those that eager adds up.
    """
    model, rows = family.model, tokens * family.model.top_k
    calls = 4 * (rows * (4 * model.hidden_size + 5 * model.intermediate_size) + 5 * tokens * family.shared_intermediate_size)
    expert = 3 * model.hidden_size * max(model.intermediate_size, family.shared_intermediate_size) * 8
    weights = family.num_weights() * (2 * dtype.itemsize + 1 if quantised else dtype.itemsize)
    return 4 * (weights + calls + expert) if training else weights + calls + expert


def check_memory(name: str, factor: float, tokens: int, dtype: torch.dtype, device: torch.device,
                 training: bool = False, quantised: bool = False) -> None:
    """MemoryError, with a scale that fits, if family `name`, scaled by `factor`, does not."""
    family, available = block_models.FAMILIES[name], available_bytes(device)

    def at_scale(factor: float) -> int:
        return needed_bytes(block_models.scaled(family, factor), tokens, dtype, training, quantised)

    needed = at_scale(factor)
    if needed <= available:
        return
    factors = (2**power for power in range(1, 8))
    fits = next((factor for factor in factors if at_scale(factor) <= available), None)
    advice = "too many tokens for any scale" if fits is None else f"--scale {fits} would fit"
    raise MemoryError(f"{name} with {tokens} tokens needs about {needed / 1e9:.1f} GB at scale {factor:g}, and "
                      f"{available / 1e9:.1f} GB are free on {device.type}: {advice}")


def run_family(name: str, factor: float, token_counts: list[int], dtype_name: str, device: torch.device, fusions: Fusions,
               seconds: float, mode: str = "forward", autotune: bool = False, weights_name: str = "dense") -> Iterator[Result]:
    """Times one family for each token count, on one set of weights. In training both permutations are always fused.

    weights_name: "dense" or one of `CHECKPOINTS`, for inference only."""
    training = mode != "forward"
    family = block_models.scaled(block_models.FAMILIES[name], factor)
    weights = block_models.make_weights(family, DTYPES[dtype_name], device, training)
    codes = None
    if weights_name != "dense":
        codes, weights = block_models.quantised(family, weights, CHECKPOINTS[weights_name])
    for tokens in token_counts:
        with torch.inference_mode(not training):
            inputs = block_models.make_inputs(family, tokens, DTYPES[dtype_name], device, training)
            result = _run_case(name, family, weights, codes, inputs, dtype_name, Fusions() if training else fusions, seconds, mode,
                               autotune)
        yield replace(result, weights=weights_name)


def _run_case(name: str, family: Family, weights: Weights, codes: Weights | None, inputs: Inputs, dtype_name: str, fusions: Fusions,
              seconds: float, mode: str, autotune: bool) -> Result:
    device, model = inputs.hidden_states.device, family.model
    tokens, itemsize = len(inputs.hidden_states), inputs.hidden_states.itemsize
    calls, not_run, wrong = _checked_calls(family, weights, codes, inputs, fusions, mode, autotune)
    medians = interleaved_medians(calls, device, seconds)
    fastest = min((peer for peer in calls if peer in block_peers.PEERS), key=medians.__getitem__)
    ours = medians["moe_xe"]
    flops, active_experts = MODES[mode] * family.flops(tokens), len(inputs.topk_ids.unique())
    weight_bytes = None if codes is None else (codes.w13.nbytes + codes.w2.nbytes) / (weights.w13.numel() + weights.w2.numel())
    num_bytes = _least_bytes(family, tokens, active_experts, itemsize, mode, weight_bytes)
    record = record_for(device)
    return Result(
        model=name, weights="dense", mode=mode, device=device.type, dtype=dtype_name, hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size, shared_intermediate_size=family.shared_intermediate_size,
        num_experts=model.num_experts, top_k=model.top_k, tokens=tokens, rows=tokens * model.top_k,
        active_experts=active_experts, permute_x=fusions.gather, permute_y=fusions.scatter, autotune=autotune, moe_xe_ms=1e3 * ours,
        **{f"{way}_ms": 1e3 * medians[way] if way in medians else None for way in ("moe_xe_dense", *block_peers.PEERS)},
        not_run=not_run, fastest_peer=fastest, speedup=medians[fastest] / ours, gflops=flops / ours / 1e9,
        gbytes_per_s=num_bytes / ours / 1e9,
        roofline=record and record.roofline_seconds(flops, num_bytes, _PLAN_DTYPES[dtype_name]) / ours,
        moe_xe_peak_bytes=peak_bytes(calls["moe_xe"], device), fastest_peer_peak_bytes=peak_bytes(calls[fastest], device),
        wrong=wrong)


def _least_bytes(family: Family, tokens: int, active_experts: int, itemsize: int, mode: str, weight_bytes: float | None) -> int:
    """Backward reads what forward does, and the output's gradient, and writes gradients of all weights and the input."""
    forward = family.least_bytes(tokens, active_experts, itemsize, weight_bytes)
    backward = forward + (family.num_weights() + tokens * family.model.hidden_size) * itemsize
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class _Outputs:
    """What is timed and checked where no gradients are asked for: the forward pass, and its rows `sample`."""
    sample: torch.Tensor
    expected: dict[str, torch.Tensor]

    def call(self, forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return forward

    def sampled(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"output": out[self.sample]}


def _checked_calls(family: Family, weights: Weights, codes: Weights | None, inputs: Inputs, fusions: Fusions,
                   mode: str, autotune: bool) -> tuple[Calls, dict[str, str], list[str]]:
    """moe_xe and the peers that run here, why others do not, and whose output is wrong."""
    hidden_states = inputs.hidden_states
    tokens = len(hidden_states)
    sample = torch.linspace(0, tokens - 1, min(tokens, _SAMPLE), device=hidden_states.device).long()
    training = mode != "forward"
    measured = (Gradients(family, weights, inputs, sample, with_forward=mode == "both") if training else
                _Outputs(sample, {"output": block_models.reference(family, weights, inputs, sample)}))

    def right(results, roundings: int) -> bool:
        """Independent roundings, one after another, add as squares."""
        for name, result in measured.sampled(results).items():
            expected = measured.expected[name]
            found, once = difference(result.cpu(), expected), tolerance(hidden_states.dtype, family.model.intermediate_size)
            # weights' gradients of a few rows are outer products, with values far beyond the eight RMS of `tolerance`
            peak = max(1.0, float(expected.abs().max() / expected.square().mean().sqrt()) / 8)
            if not (found.max_error <= once.max_error * peak * roundings**0.5 and found.calc_diff <= once.calc_diff * roundings):
                return False
        return all(torch.isfinite(tensor).all() for tensor in (results.values() if training else [results]))

    # moe_xe rounds the first GEMM's input, the second's and the sum; a peer whatever it stores, and each expert's part;
    # a gradient has the roundings of the forward pass and then its own
    passes = 2 if training else 1
    def ours(weights: Weights):
        return measured.call(lambda: block_models.run_fused(family, weights, inputs, fusions, autotune))

    calls: Calls = {"moe_xe": ours(weights)} if codes is None else {"moe_xe": ours(codes), "moe_xe_dense": ours(weights)}
    rounded = {"moe_xe": _INT8_ROUNDINGS if codes is not None and codes.int8_rows else 3}
    wrong = [way for way, call in calls.items() if not right(call(), rounded.get(way, 3) * passes)]
    not_run, own = {}, len(calls)
    for peer in block_peers.PEERS:
        temporary = block_peers.temporary_bytes(peer, family, tokens, hidden_states.itemsize, training)
        available = available_bytes(hidden_states.device)
        if temporary > available:
            not_run[peer] = (f"it would need {temporary / 1e9:.1f} GB beside the weights, and {available / 1e9:.1f} GB "
                             "are free")
            continue
        try:
            call = measured.call(block_peers.make_peer(peer, family, weights, inputs))
            results = call()
        except RuntimeError as error:    # what the device's torch cannot do
            not_run[peer] = str(error).partition("\n")[0]
            continue
        calls[peer] = call
        if not right(results, passes * (6 + family.model.top_k)):
            wrong.append(peer)
    if len(calls) == own:
        raise RuntimeError(f"none of Transformers' ways runs here: {not_run}")
    return calls, not_run, wrong
