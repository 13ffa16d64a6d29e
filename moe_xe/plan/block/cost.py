"""How long a block takes on an Xe GPU: the launches, and what each of its kernels takes on the device.

docs/choosing.md has the formulae. Constants are counted in machine code that xesim executes (tests/xe/test_block_cost.py).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..formats import Quantization
from ..model.cost import LAUNCH_SECONDS, Prediction, overlapped, own_kernel, predict
from ..model.devices import DeviceRecord
from ..problem import Activation, Dtype, GroupedGemmProblem, RowScale, WeightLayout
from ..xe.candidates import choose_xe_config
from .activate import QuantizeRowsProblem, sub_groups
from .one_launch import few_pairs, gains_from_int8_rows
from .token_sort import LANE_BYTES, LANES, default_y_dtype


@dataclass(frozen=True)
class BlockShape:
    """A block of gated experts with all fusions, without a shared one. y: of the rows that are summed, by default `fused_moe`'s.

    routing: whether a launch before it makes weights and ids of the router's logits. quantization: of the weights, if they are codes.
    int8_rows: `fused_moe`'s activations="int8".
    """
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    dtype: Dtype = Dtype.bf16
    weights: WeightLayout = WeightLayout.enk
    y: Dtype | None = None
    routing: bool = True
    quantization: Quantization | None = None
    int8_rows: bool = False

    @property
    def y_dtype(self) -> Dtype:
        """Of the second GEMM's results: of the block's, where no sum follows."""
        return self.dtype if self.top_k == 1 else self.y or default_y_dtype(self.dtype)

    def gemms(self, num_tokens: int) -> tuple[GroupedGemmProblem, GroupedGemmProblem]:
        """What the two are compiled for, in a block of so many tokens."""
        rows = Dtype.i8 if self.multiplies_codes(num_tokens) else self.dtype
        gate_up = GroupedGemmProblem(2 * self.intermediate_size, self.hidden_size, rows, self.dtype, self.weights, gathered=True,
                                     slots=self.top_k, activation=Activation(), quantization=self.quantization)
        down = GroupedGemmProblem(self.hidden_size, self.intermediate_size, rows, self.y_dtype, self.weights, scattered=True,
                                  row_scale=RowScale.outputs, quantization=self.quantization)
        return gate_up, down

    def multiplies_codes(self, num_tokens: int) -> bool:
        """Whether rows are quantised before each GEMM."""
        return self.int8_rows and gains_from_int8_rows(num_tokens, self.top_k, self.num_experts)


@dataclass(frozen=True)
class BlockPrediction:
    """parts: seconds of "launches" and of each kernel's work, which add up. y_bytes: written by the second GEMM, and read by the sum."""
    launches: int
    parts: dict[str, float]
    gate_up: Prediction
    down: Prediction
    y_bytes: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def block_launches(num_tokens: int, top_k: int, int8_rows: bool = False) -> int:
    """Kernels of a block with all fusions, without its routing: one for few pairs; else sort, two GEMMs and the sum over slots, which
    one slot does not need. int8_rows: and one before each GEMM."""
    return 1 if few_pairs(num_tokens, top_k) and not int8_rows else 3 + (top_k > 1) + 2 * int8_rows


def predict_block(shape: BlockShape, num_tokens: int, tokens_per_expert: Sequence[int], device: DeviceRecord) -> BlockPrediction:
    """The time of one block in its default configurations. Raises ValueError for a device that is no Xe GPU."""
    rows = sum(tokens_per_expert)
    problems = shape.gemms(num_tokens)
    configs = [choose_xe_config(problem, rows, shape.num_experts, device) for problem in problems]
    gate_up, down = (predict(problem, tokens_per_expert, own_kernel(problem, config, device), device, launches=0)
                     for problem, config in zip(problems, configs))
    int8 = shape.multiplies_codes(num_tokens)
    kernels = block_launches(num_tokens, shape.top_k, int8) + shape.routing
    parts = {"launches": kernels * LAUNCH_SECONDS, "route": route_seconds(shape, num_tokens, device) if shape.routing else 0.0,
             "sort": sort_seconds(shape, num_tokens, device), "gate_up": gate_up.seconds, "down": down.seconds,
             "combine": combine_seconds(shape, num_tokens, device, rows)}
    if int8:
        parts["quantize"] = (quantize_rows_seconds(num_tokens, shape.hidden_size, shape.dtype, device) +
                             quantize_rows_seconds(rows, shape.intermediate_size, shape.dtype, device))
    return BlockPrediction(kernels, parts, gate_up, down, rows * shape.hidden_size * shape.y_dtype.size)


def route_instructions(num_experts: int, top_k: int) -> float:
    """Of all sub-groups, for one token; softmax."""
    return 157 + -(-num_experts // LANES) * (23.5 + 8.75 * top_k)


def sort_instructions(num_tokens: int) -> float:
    """Of the work-group that sorts one expert's tokens."""
    return 300 + 11 * num_tokens


def combine_instructions(hidden_size: int, slots: int, y: Dtype) -> float:
    """Of all sub-groups, for one token."""
    columns = LANE_BYTES // y.size
    return -(-hidden_size // (columns * LANES)) * (70 + 10 * columns + slots * (9 + 2.5 * columns))


def quantize_rows_instructions(row_size: int) -> float:
    """Of all sub-groups, for one row that lanes take eight numbers of at a time."""
    return 118 * sub_groups(QuantizeRowsProblem(row_size, Dtype.bf16, 8)) + 116 * -(-row_size // (8 * LANES))


def quantize_rows_seconds(rows: int, row_size: int, dtype: Dtype, device: DeviceRecord) -> float:
    num_bytes = rows * row_size * (dtype.size + Dtype.i8.size)
    return overlapped(rows * quantize_rows_instructions(row_size) / (device.xe_cores * issue_rate(device)), num_bytes / (device.bandwidth * 1e9))


def issue_rate(device: DeviceRecord) -> float:
    """Instructions a second, of one Xe core."""
    return device.architecture.engines * device.clock * 1e9


def route_seconds(shape: BlockShape, num_tokens: int, device: DeviceRecord) -> float:
    num_bytes = num_tokens * (shape.num_experts * shape.dtype.size + shape.top_k * 8)
    instructions = num_tokens * route_instructions(shape.num_experts, shape.top_k)
    return overlapped(instructions / (device.xe_cores * issue_rate(device)), num_bytes / (device.bandwidth * 1e9))


def sort_seconds(shape: BlockShape, num_tokens: int, device: DeviceRecord) -> float:
    """An expert's tokens are sorted by one core."""
    experts = max(shape.num_experts / device.xe_cores, 1.0)
    return experts * sort_instructions(num_tokens) / issue_rate(device)


def combine_seconds(shape: BlockShape, num_tokens: int, device: DeviceRecord, rows: int) -> float:
    """rows: of y, fewer than all slots where pairs were dropped."""
    if shape.top_k == 1:
        return 0.0
    num_bytes = shape.hidden_size * (rows * shape.y_dtype.size + num_tokens * shape.dtype.size)
    instructions = num_tokens * combine_instructions(shape.hidden_size, shape.top_k, shape.y_dtype)
    return overlapped(instructions / (device.xe_cores * issue_rate(device)), num_bytes / (device.bandwidth * 1e9))
