"""What the cost model expects of moe_xe's own kernels for the models of workloads.py."""
from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ..device import facts_of, queue_for
from ..ops.launch import target_of
from ..plan.block.cost import BlockPrediction, BlockShape, predict_block
from ..plan.formats import Quantization
from ..plan.gemm.config import TileConfig, XeConfig
from ..plan.gemm.heuristics import Family, choose_config
from ..plan.model.cost import own_kernel, predict, predict_cpu
from ..plan.model.devices import DeviceRecord, record_named
from ..plan.problem import Dtype, GroupedGemmProblem, WeightLayout
from ..plan.xe.candidates import choose_xe_config
from . import workloads
from .roofline import record_for


@dataclass(frozen=True)
class Case:
    """One predicted grouped GEMM. ms: milliseconds; roofline: share of it; bound_by: the resource that takes the longest."""
    device: str
    model: str
    n: int
    k: int
    tokens: int
    rows: int
    config: str
    ms: float
    tflops: float
    roofline: float
    bound_by: str
    parts_ms: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


def rows_of(model: workloads.Model, tokens: int) -> list[int]:
    """Rows per expert as `moe-xe bench gemm` has them: random, or those recorded for gpt-oss-20b's prefill."""
    if model.name == "gpt-oss-20b" and tokens >= 1024:
        recorded = workloads.recorded_layers()[0]
        return [round(rows * tokens * model.top_k / sum(recorded)) for rows in recorded]
    return workloads.routed_rows(model, tokens, torch.Generator().manual_seed(tokens))


def device_record(name: str) -> DeviceRecord:
    """By name; "cpu" is measured. Raises ValueError for any other name than a record's."""
    return record_for(torch.device("cpu")) if name.lower() == "cpu" else record_named(name)


def describe(config: TileConfig) -> str:
    """Heights and width of the tiles; on a GPU also what a sub-group computes of the tallest and of the shortest; parts of K."""
    def ends(values: list) -> str:
        return "-".join(str(value) for value in dict.fromkeys((values[0], values[-1])))

    tiles = f"{ends(config.heights)} x {config.tile_width}"
    splits = f", {config.splits} splits" if config.splits > 1 else ""
    if not isinstance(config, XeConfig):
        return tiles + splits
    shapes = [f"{rows}x{columns}" for rows, columns in zip(config.sub_group_rows, config.sub_group_columns)]
    return f"{tiles}, {ends(shapes)}{splits}"


def predict_case(model: workloads.Model, gemm: int, tokens: int, device: DeviceRecord, dtype: Dtype, layout: WeightLayout,
                 gathered: bool, quantization: Quantization | None = None, int8_rows: bool = False) -> Case:
    """One of the model's two GEMMs (`gemm` 0 or 1) in its default configuration. quantization: of its weights, on Xe GPUs;
    int8_rows: they are multiplied with rows that are int8, too."""
    (n, k), rows = model.gemms()[gemm], rows_of(model, tokens)
    problem = GroupedGemmProblem(n, k, Dtype.i8 if int8_rows else dtype, dtype, layout, gathered=gathered and gemm == 0,
                                 quantization=quantization)
    if device.architecture is None:
        isa = target_of(facts_of(queue_for(torch.device("cpu")))).isa
        config: TileConfig = choose_config(problem, Family.cpu, sum(rows), model.num_experts, device.xe_cores, isa=isa)
        prediction = predict_cpu(problem, rows, config, device)
    else:
        config = choose_xe_config(problem, sum(rows), model.num_experts, device)
        prediction = predict(problem, rows, own_kernel(problem, config, device), device, launches=0)
    return Case(device.name, model.name, n, k, tokens, sum(rows), describe(config), 1e3 * prediction.seconds, prediction.tflops,
                prediction.roofline_share, prediction.bound_by,
                {part: 1e3 * seconds for part, seconds in {**prediction.parts, "tail": prediction.tail}.items()})


def predict_model_block(model: workloads.Model, tokens: int, device: DeviceRecord, dtype: Dtype, layout: WeightLayout,
                        y: Dtype | None = None, quantization: Quantization | None = None, int8_rows: bool = False) -> BlockPrediction:
    """The model's whole block with its routing, in default configurations. Raises ValueError for a device that is no Xe GPU."""
    shape = BlockShape(model.hidden_size, model.intermediate_size, model.num_experts, model.top_k, dtype, layout, y,
                       quantization=quantization, int8_rows=int8_rows)
    return predict_block(shape, tokens, rows_of(model, tokens), device)
