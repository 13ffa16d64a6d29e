"""The default configurations of models' GEMMs compile without spills: a few, and, marked slow, all of them on every device."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from moe_xe.bench.block_models import FAMILIES, Family
from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import Summary, summarize
from moe_xe.plan.xe.candidates import choose_xe_config
from moe_xe.plan.gemm.config import XeConfig
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale, WeightLayout

missing = spirv.missing() or ocloc.missing()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

DEVICES = {"bmg": "b580", "pvc": "max1550", "lnl-m": "lunar-lake", "ptl-h": "panther-lake"}
BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
ROWS = [1 << i for i in range(17)]


def gemms(family: Family, layout: WeightLayout) -> dict[str, GroupedGemmProblem]:
    """Those of the block, forward and backward, and plain ones; tf32 and fp16 for gpt-oss."""
    (n1, k1), (n2, k2) = family.model.gemms()
    slots, bias = family.model.top_k, BF16 if family.bias else None
    activation = Activation(ActivationKind(family.activation), interleaved=family.interleaved, alpha=family.alpha, limit=family.limit)
    gathered = dict(weights=layout, gathered=True, slots=slots)
    first = GroupedGemmProblem(n1, k1, BF16, BF16, activation=activation, bias=bias, **gathered)
    second = GroupedGemmProblem(n2, k2, BF16, F32, layout, scattered=True, row_scale=RowScale.outputs, bias=bias)
    found = {
        "first": first, "second": second, "second, bf16": replace(second, output=BF16), "plain": GroupedGemmProblem(n1, k1, BF16, BF16, layout),
        "plain, gathered": GroupedGemmProblem(n1, k1, BF16, BF16, **gathered),
        "gradient of the hidden states": GroupedGemmProblem(k1, n1, BF16, F32, layout, scattered=True),
        "gradient of the second's input": GroupedGemmProblem(k2, n2, BF16, BF16, row_scale=RowScale.outputs, **gathered),
    }
    if family is FAMILIES["gpt-oss"]:
        found |= {"first, fp16": replace(first, input=F16, output=F16), "first, tf32": replace(first, input=F32, output=F32, tf32=True),
                  "second, tf32": replace(second, input=F32, tf32=True)}
    return found


def defaults(family: Family, layout: WeightLayout, device: str) -> Iterator[tuple[str, GroupedGemmProblem, XeConfig]]:
    """Every distinct default on this device over all numbers of rows."""
    record = record_named(DEVICES[device])
    for name, problem in gemms(family, layout).items():
        for config in dict.fromkeys(choose_xe_config(problem, rows, family.model.num_experts, record) for rows in ROWS):
            yield name, problem, config


def summary_of(problem: GroupedGemmProblem, config: XeConfig, device: str) -> Summary:
    return summarize(kernels.build(problem, config, device), "grouped_gemm")


@pytest.mark.few(1)
@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.full), 1024])
@pytest.mark.parametrize("name", ["first", "second", pytest.param("second, bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", WeightLayout)
def test_no_spills_with_few_and_many_rows(layout, name, rows):
    """test_codegen.py does the same for prefill."""
    problem = gemms(FAMILIES["qwen3"], layout)[name]
    summary = summary_of(problem, kernels.default_config(problem, rows, 128), "bmg")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())


@pytest.mark.few(1)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("name", ["first", "second"])
def test_no_spills_where_k_is_in_parts(name, layout, device):
    """With so few columns every device shares K out."""
    problem = replace(gemms(FAMILIES["gpt-oss"], layout)[name], n=128, k=4096)
    config = choose_xe_config(problem, 1, 32, record_named(DEVICES[device]))
    assert config.splits > 1
    summary = summary_of(problem, config, device)
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())


@pytest.mark.parametrize("layout", [WeightLayout.enk, pytest.param(WeightLayout.ekn, marks=pytest.mark.full)])
def test_no_spills_where_heights_share_a_shape(layout):
    """Their code differs so little that the compiler would like to join its ends, with all sums copied there."""
    problem = gemms(FAMILIES["qwen3"], layout)["second"]
    config = kernels.default_config(problem, 512, 128)
    shapes = list(zip(config.sub_group_rows, config.sub_group_columns))
    assert layout is WeightLayout.ekn or shapes[:2] == [(32, 64)] * 2
    assert summary_of(problem, config, "bmg").spill_bytes == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", WeightLayout)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_default_spills(family, layout, device):
    """N and K matter little to registers: each set of sub-groups is compiled once, on bmg for each kind of GEMM and width."""
    seen, spilled = set(), []
    for name, problem, config in defaults(FAMILIES[family], layout, device):
        shapes = tuple(zip(config.heights, config.sub_group_rows, config.sub_group_columns))
        kind = (name, config.tile_width, config.prefetch_distance) if device == "bmg" else (problem.gathered, problem.pairs, config.tile_width)
        kind = (*kind, config.splits > 1)
        if (kind, shapes) in seen:
            continue
        seen.add((kind, shapes))
        summary = summary_of(problem, config, device)
        if summary.spill_bytes or summary.private_bytes or summary.stack_calls or summary.grf != 256:
            spilled.append((name, config, summary.spill_bytes))
    assert seen and not spilled
