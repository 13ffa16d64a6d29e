"""Tiles whose K several work-groups share, on the CPU device: against float64, and bit by bit whoever comes last."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_xe.device import queue_for
from moe_xe.ops.launch import launch
from moe_xe.ops.submission import Submission
from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import RowScale

from .test_fused_epilogues_cpu_device import BF16, F16, F32, FIRST, OAI, SILU, make
from .test_mainloops_cpu_device import EACH_ISA, LAYOUTS, USABLE_ISAS, cpu, generic

COUNTS = [3, 0, 1, 9, 0]      # read in place, and packed
BEST = USABLE_ISAS[-1] if "avx2" not in USABLE_ISAS else "avx2"


def split_cpu(isa: str = BEST, **changes):
    return cpu(isa, **{"tile_width": 64, "micro_rows": 5, "splits": 4, **changes})


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FIRST)
def test_first_gemm(name, layout, isa):
    """K of whole chunks and a tail; several blocks of K a part."""
    make(layout, F32 if isa == "baseline" else BF16, counts=COUNTS, k=1101, **FIRST[name]).check(split_cpu(isa, k_block=64))


@pytest.mark.parametrize("layout, splits, k", [("enk", 2, 512), pytest.param("ekn", 3, 800, marks=pytest.mark.full),
                                               pytest.param("enk", 8, 2063, marks=pytest.mark.full)])
def test_second_gemm(layout, splits, k):
    make(layout, F16, counts=COUNTS, k=k, scattered=True, out_dtype=F32, row_scale=RowScale.outputs, bias=F32).check(split_cpu(splits=splits))


@pytest.mark.parametrize("layout, fields", [
    ("enk", dict(activation=SILU, shared=1)), pytest.param("ekn", dict(activation=OAI, bias=BF16), marks=pytest.mark.full),
    pytest.param("enk", dict(scattered=True, row_scale=RowScale.outputs, out_dtype=F32), marks=pytest.mark.full)],
    ids=["halves", "interleaved", "scattered"])
def test_generic_main_loop(layout, fields):
    make(layout, BF16, counts=COUNTS, k=781, **fields).check(generic(sub_group_columns=(32,), splits=3))


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [split_cpu(), generic(sub_group_columns=(32,), splits=4)], ids=["cpu", "generic"])
def test_bitwise_equal(config):
    """Whatever the schedule and, of the CPU's own kernel, the number of work-groups; tests/xe has the generic one's."""
    call = make("enk", F32, counts=COUNTS, k=1101, activation=SILU).call
    threads = [dict(threads=number) for number in (1, 2, 3, 16)] if hasattr(config, "threads") else [{}]
    variants = [replace(config, **fields, schedule=schedule) for fields in threads for schedule in Schedule]
    results = []
    for variant in 10 * variants:
        out = torch.full((call.total_rows, call.w.shape[1] // 2), float("nan"))
        with force_config(variant), Submission(queue_for(out.device), out.device) as submission:
            launch(submission, call, out)
        results.append(out[:sum(COUNTS)])
    assert results[0].isfinite().all()
    assert all(torch.equal(result, results[0]) for result in results)
