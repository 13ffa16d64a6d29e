"""The predicted time of a block: what it adds up, and what makes it shorter or longer."""
from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from moe_xe.bench.published import block_comparisons, mean_speedup
from moe_xe.plan.block.cost import BlockShape, block_launches, combine_seconds, predict_block
from moe_xe.plan.block.one_launch import MOST_PAIRS
from moe_xe.plan.block.token_sort import aligned_columns, combine_columns, default_y_dtype
from moe_xe.plan.formats import CHECKPOINTS
from moe_xe.plan.model.cost import LAUNCH_SECONDS, own_kernel, predict
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.problem import Dtype
from moe_xe.plan.xe.candidates import choose_xe_config

B60 = record_named("b60")
QWEN3 = BlockShape(2048, 768, 128, 8)
ROWS = [512] * 128      # 8192 tokens


def test_a_block_is_the_sum_of_its_parts():
    block = predict_block(QWEN3, 8192, ROWS, B60)
    gemms = [predict(problem, ROWS, own_kernel(problem, choose_xe_config(problem, 65536, 128, B60), B60), B60, launches=0).seconds
             for problem in QWEN3.gemms(8192)]
    assert (block.parts["gate_up"], block.parts["down"]) == tuple(gemms)
    assert block.launches == 5 and block.parts["launches"] == 5 * LAUNCH_SECONDS
    assert block.seconds == pytest.approx(sum(block.parts.values())) and all(seconds > 0 for seconds in block.parts.values())
    without = predict_block(replace(QWEN3, routing=False), 8192, ROWS, B60)
    assert without.launches == 4 and without.parts["route"] == 0 and without.parts["down"] == block.parts["down"]


def test_rows_in_sixteen_bits_are_half_the_traffic():
    own, wide = (predict_block(replace(QWEN3, y=y), 8192, ROWS, B60) for y in (None, Dtype.f32))
    assert (own.y_bytes, wide.y_bytes) == (65536 * 2048 * 2, 65536 * 2048 * 4)
    saved = {part: wide.parts[part] - own.parts[part] for part in own.parts}
    assert saved["combine"] == pytest.approx(own.y_bytes / (B60.bandwidth * 1e9), rel=0.05)
    assert saved["down"] > 0 and saved["gate_up"] == saved["sort"] == saved["launches"] == 0


def test_what_one_expert_a_token_does_not_have():
    """Its results are the block's."""
    one = replace(QWEN3, top_k=1)
    assert one.y_dtype is Dtype.bf16 and replace(one, dtype=Dtype.f16).y_dtype is Dtype.f16
    assert combine_seconds(one, 8192, B60, 8192) == 0 and predict_block(one, 8192, [64] * 128, B60).launches == 4


def test_launches():
    assert block_launches(8192, 8) == 4 and block_launches(8192, 1) == 3
    assert block_launches(MOST_PAIRS // 8, 8) == block_launches(1, 1) == 1 and block_launches(MOST_PAIRS // 8 + 1, 8) == 4
    assert predict_block(QWEN3, 1, [1] * 8 + [0] * 120, B60).launches == 2


def test_int8_rows_are_for_many_tokens():
    """Two launches more, and half of the time in the matrix engines."""
    shape = replace(QWEN3, quantization=CHECKPOINTS["w8a8"].quantization)
    codes = replace(shape, int8_rows=True)
    assert predict_block(codes, 128, [8] * 128, B60) == predict_block(shape, 128, [8] * 128, B60)
    slow, fast = (predict_block(shape, 8192, ROWS, B60) for shape in (shape, codes))
    assert fast.launches == slow.launches + 2 and fast.parts["quantize"] > 0 and "quantize" not in slow.parts
    assert predict_block(replace(codes, num_experts=8, top_k=2), 512, [128] * 8, B60).parts["quantize"] > 0
    assert 1.6 < (slow.parts["gate_up"] + slow.parts["down"]) / (fast.parts["gate_up"] + fast.parts["down"]) <= 2


def test_the_default_type_of_rows():
    assert [default_y_dtype(dtype) for dtype in (Dtype.bf16, Dtype.f16, Dtype.f32)] == [Dtype.bf16, Dtype.f32, Dtype.f32]


@pytest.mark.parametrize("columns, dtype, aligned", [(1, Dtype.bf16, 8), (333, Dtype.f16, 336), (333, Dtype.f32, 336), (2048, Dtype.bf16, 2048)])
def test_rows_that_loads_divide(columns, dtype, aligned):
    assert aligned_columns(columns, dtype) == aligned


@pytest.mark.parametrize("y_row, input, out_row, output, expected", [
    ((0, 2048, 2048), Dtype.bf16, (0, 2048, 2048), Dtype.bf16, (8, 8)),
    ((0, 2048, 2048), Dtype.f32, (0, 2048, 2048), Dtype.bf16, (4, 4)),
    ((0, 2048, 2048), Dtype.bf16, (0, 2048, 2048), Dtype.f32, (8, 4)),
    ((0, 336, 336), Dtype.bf16, (0, 333, 333), Dtype.bf16, (8, 1)),        # padded rows
    ((0, 336, 333), Dtype.bf16, (0, 336, 336), Dtype.bf16, (1, 1)),        # whose padding is not to be read
    ((4, 2048, 2048), Dtype.bf16, (8, 2048, 2048), Dtype.bf16, (2, 2)),
    ((16, 2048, 2048), Dtype.f32, (2, 2048, 2048), Dtype.f16, (4, 1))])
def test_accesses_of_the_sum(y_row, input, out_row, output, expected):
    assert combine_columns(y_row, input, out_row, output) == expected


def test_a_few_published_layers():
    """The first of those below: of one token, and of many."""
    found = list(islice(block_comparisons(), 6))
    assert len(found) == 6 and all(1 < comparison.speedup < 2 for comparison in found)


@pytest.mark.full
def test_published_layers():
    """What docs/choosing.md says of today's blocks; `moe-xe predict --block --check` prints each."""
    found = list(block_comparisons())
    assert len(found) == 49 and all(comparison.ours.seconds > 0 for comparison in found)
    assert 1.15 < mean_speedup(found) < 1.4


@pytest.mark.full
def test_wider_rows_cost():
    assert mean_speedup(list(block_comparisons())) > mean_speedup(list(block_comparisons(Dtype.f32))) + 0.03
