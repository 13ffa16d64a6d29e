"""Other people's measurements (plan/model/data/published.yaml) beside what the cost model predicts for their kernels, and their layers
beside what it predicts for moe_xe's."""
from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

import torch
import yaml

from ..plan.block.cost import BlockPrediction, BlockShape, predict_block
from ..plan.formats import CHECKPOINTS
from ..plan.gemm.config import Schedule, XeConfig
from ..plan.model import cost as cost_model
from ..plan.model.devices import DeviceRecord, find_record
from ..plan.problem import Activation, Dtype, GroupedGemmProblem, WeightLayout
from ..plan.xe.candidates import choose_xe_config
from . import workloads

TILE_INSTRUCTIONS = 720         # of a sub-group outside the K loop, counted in CUTLASS's MoE example
REFERENCE_SUMS = 32 * 64        # of the sub-group that `step` was counted for


@dataclass(frozen=True)
class Comparison:
    """One published time and the predicted one, in seconds; ours: of moe_xe's kernel for the same GEMM, predicted, if it is one."""
    source: str
    device: str
    case: str
    measured: float
    predicted: float
    bound_by: str
    ours: float | None = None

    @property
    def speedup(self) -> float | None:
        """What moe_xe's kernel, by the model, is faster than the published time."""
        return self.measured / self.ours if self.ours else None

    @property
    def error(self) -> float:
        """Relative: positive where the prediction is too slow."""
        return self.predicted / self.measured - 1


@functools.cache
def _data() -> dict:
    return yaml.safe_load(files("moe_xe.plan.model").joinpath("data/published.yaml").read_text())


def _pair(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def kernel(name: str) -> cost_model.Kernel:
    """A library's kernel by its name in the data."""
    entry = _data()["kernels"][name]
    (height, width), (rows, columns) = _pair(entry["tile"]), _pair(entry["sub_group"])
    config = XeConfig(heights=(height,), tile_width=width, raster_group=1, min_fill_eighths=8,
                      schedule=Schedule(entry["schedule"]), sub_group_rows=(rows,), sub_group_columns=(columns,), prefetch_distance=3)
    dpas = REFERENCE_SUMS / cost_model.STEP_DPAS_SUMS

    def code(rows: int, columns: int) -> cost_model.Code:
        multiplying, others = rows * columns / cost_model.STEP_DPAS_SUMS, entry["step"] - dpas
        return cost_model.Code(multiplying + others + entry.get("convert", 0) * columns * 32, TILE_INSTRUCTIONS)

    return cost_model.Kernel(config, code, entry["groups_per_core"], entry.get("weight_bytes"))


def _problem(n: int, k: int, activation: Activation | None = None) -> GroupedGemmProblem:
    return GroupedGemmProblem(n, k, Dtype.bf16, Dtype.bf16, WeightLayout.ekn, activation=activation)


def _median(device: DeviceRecord, problem: GroupedGemmProblem, layers: list[list[int]], of: cost_model.Kernel, launches: int):
    """The prediction that is in the middle of those for several layers."""
    predictions = sorted((cost_model.predict(problem, rows, of, device, launches) for rows in layers), key=lambda found: found.seconds)
    return predictions[len(predictions) // 2]


def _own_seconds(device: DeviceRecord, case: dict, layers: list[list[int]]) -> float:
    """Of moe_xe's kernel, gathered rows of [E, N, K] weights, in the default configuration for the sum of the rows."""
    (n, k), dtype = case["gemm"], Dtype(case.get("dtype", "bf16"))
    quantization = CHECKPOINTS[case["weights"]].quantization if "weights" in case else None
    problem = GroupedGemmProblem(n, k, dtype, dtype, gathered=True, quantization=quantization)
    config = choose_xe_config(problem, sum(layers[0]), case["experts"], device)
    return _median(device, problem, layers, cost_model.own_kernel(problem, config, device), case["launches"]).seconds


def _compare_gemm(device: DeviceRecord, case: dict) -> tuple[str, float, cost_model.Prediction, float]:
    (n, k), experts = case["gemm"], case["experts"]
    layers = workloads.recorded_layers() if case["rows"] == "recorded" else [[case["rows"]] * case.get("active", experts)]
    predicted = _median(device, _problem(n, k), layers, kernel(case["kernel"]), case["launches"])
    flops = statistics.median(2 * sum(rows) * n * k for rows in layers)
    measured = case["ms"] / 1e3 if "ms" in case else flops / case["tflops"] / 1e12
    name = f"{case['kernel']}, {experts} x {case['rows']} rows, {n}x{k} {case.get('name', '')}".strip()
    return name, measured, predicted, _own_seconds(device, case, layers)


def _rows_of_layer(case: dict) -> list[int]:
    model = workloads.Model("", case["hidden"], case["shard"] // 2, case["experts"], case["top_k"])
    return workloads.routed_rows(model, case["tokens"], torch.Generator().manual_seed(case["tokens"]))


def _name_of_layer(case: dict) -> str:
    return "layer of {tokens} tokens, {experts} experts, top {top_k}, {hidden} x {shard}".format(**case)


def _compare_layer(device: DeviceRecord, case: dict) -> tuple[str, float, float, str]:
    tokens, hidden, shard = case["tokens"], case["hidden"], case["shard"]
    rows = _rows_of_layer(case)
    fused = "fused" in case["kernels"][0]
    gemms = [cost_model.predict(_problem(*shape), rows, kernel(name), device, 0) for shape, name in
             zip([(shard, hidden, Activation() if fused else None), (hidden, shard // 2)], case["kernels"])]
    elements = (tokens + sum(rows)) * hidden * 2                    # copies to the experts and back
    if not fused:
        elements += sum(rows) * shard * 3 // 2                      # the activation
    copies = 2 * elements / (device.bandwidth * 1e9)
    launches = case["launches"] * cost_model.LAUNCH_SECONDS
    parts = {"launch": launches, "copies": copies} | {gemm.bound_by: gemm.seconds for gemm in gemms}
    return _name_of_layer(case), case["ms"] / 1e3, launches + copies + sum(gemm.seconds for gemm in gemms), max(parts, key=parts.get)


def comparisons() -> Iterator[Comparison]:
    """Every published point."""
    for group in _data()["points"]:
        device = find_record(group["device"])
        for case in group["cases"]:
            name, measured, predicted, ours = _compare_gemm(device, group["common"] | case)
            yield Comparison(group["source"], device.name, name, measured, predicted.seconds, predicted.bound_by, ours)
    for group in _data()["layers"]:
        device = find_record(group["device"])
        for case in group["cases"]:
            yield Comparison(group["source"], device.name, *_compare_layer(device, case))


@dataclass(frozen=True)
class BlockComparison:
    """The published time of a whole layer, in seconds, and what moe_xe's block of the same size is expected to take."""
    source: str
    device: str
    case: str
    measured: float
    ours: BlockPrediction

    @property
    def speedup(self) -> float:
        return self.measured / self.ours.seconds


def block_comparisons(y: Dtype | None = None) -> Iterator[BlockComparison]:
    """Every published layer, with rows of this type before they are summed. Their experts are given, so ours are, too."""
    for group in _data()["layers"]:
        device = find_record(group["device"])
        for case in group["cases"]:
            shape = BlockShape(case["hidden"], case["shard"] // 2, case["experts"], case["top_k"], y=y, routing=False)
            ours = predict_block(shape, case["tokens"], _rows_of_layer(case), device)
            yield BlockComparison(group["source"], device.name, _name_of_layer(case), case["ms"] / 1e3, ours)


def mean_speedup(comparisons: list[BlockComparison]) -> float:
    """The geometric mean of peer / ours."""
    return statistics.geometric_mean(comparison.speedup for comparison in comparisons)
