"""What the cost model expects of moe_xe's own kernels for the models of workloads.py."""
from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch

from ..device import facts_of, queue_for
from ..distributed.message import RowFormat
from ..ops.launch import target_of
from ..plan.block.cost import BlockPrediction, BlockShape, predict_block
from ..plan.block.exchange import preferred_chunks
from ..plan.block.expert_parallel import LayerPrediction, local_experts, predict_layer
from ..plan.formats import Quantization
from ..plan.gemm.config import TileConfig, XeConfig
from ..plan.gemm.heuristics import Family, choose_config
from ..plan.model.cost import own_kernel, predict, predict_cpu
from ..plan.model.devices import DeviceRecord, record_named
from ..plan.model.links import Link
from ..plan.problem import Dtype, GroupedGemmProblem, WeightLayout
from ..plan.xe.candidates import choose_xe_config
from . import workloads
from .roofline import record_for

_TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.f16: torch.float16}
HIDES = 0.5                 # the share of communication of which it is asked from how many tokens on it hides
MOST_TOKENS = 1 << 16       # of a rank, that are looked at for that
DRAWN_TOKENS = 1 << 13      # of which each is routed; more tokens have as many more rows


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


@dataclass(frozen=True)
class Layers:
    """Layers of one model whose experts are spread over ranks. wire, wire_back: as `expert_parallel_moe` takes them."""
    model: workloads.Model
    device: DeviceRecord
    dtype: Dtype
    layout: WeightLayout
    quantization: Quantization | None
    int8_rows: bool
    link: Link
    network: Link
    wire: str | None = None
    wire_back: str | None = None

    def predict(self, ranks: int, tokens: int, chunks: int | None = None) -> LayerPrediction:
        """tokens: of each rank. chunks: by default what `expert_parallel_moe` takes. ValueError for a device that is no Xe GPU."""
        model = self.model
        shape = BlockShape(model.hidden_size, model.intermediate_size, model.num_experts, model.top_k, self.dtype, self.layout,
                           quantization=self.quantization, int8_rows=self.int8_rows)
        formats = (RowFormat(model.hidden_size, _TORCH_DTYPES[self.dtype], model.top_k, model.top_k, self.wire),
                   RowFormat(model.hidden_size, _TORCH_DTYPES[self.dtype], wire=self.wire_back))
        row_bytes = tuple(4 * format.words for format in formats)
        chunks = chunks or preferred_chunks(tokens, model.top_k, local_experts(shape, ranks))
        return predict_layer(shape, tokens, ranks, partial(_rows, model), self.device, self.link, self.network, row_bytes, min(chunks, tokens))

    def hidden_from(self, ranks: int, chunks: int | None = None) -> int | None:
        """The power of two from which on half of the communication hides, for as many tokens as are looked at; None if it does not."""
        found = None
        for tokens in (MOST_TOKENS >> power for power in range(MOST_TOKENS.bit_length())):
            if self.predict(ranks, tokens, chunks).hidden < HIDES:
                break
            found = tokens
        return found


@lru_cache(maxsize=64)
def _rows(model: workloads.Model, tokens: int) -> tuple[int, ...]:
    """As `rows_of`; beyond `DRAWN_TOKENS` in proportion to theirs."""
    drawn = min(tokens, DRAWN_TOKENS)
    return tuple(rows if drawn == tokens else round(rows * tokens / drawn) for rows in rows_of(model, drawn))
