"""The CPU device's products of int8 codes, with each instruction set, against float64 of the numbers that the codes stand for."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_xe.device import queue_for
from moe_xe.ops import launch
from moe_xe.ops.block.activation import apply_activation
from moe_xe.ops.submission import Submission
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Activation, ActivationKind, RowScale
from moe_xe.quantized import QuantizedWeight

from .test_mainloops_cpu_device import COUNTS, POISON, USABLE_ISAS, cpu

F32 = torch.float32
ISA = USABLE_ISAS[:2][-1]
SILU = Activation()
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=7.0)


def make(n: int, k: int, counts=COUNTS, **options) -> launch.Call:
    """All codes; memory between rows of a and between experts holds others."""
    rows, experts = sum(counts), len(counts)
    codes = torch.randint(-128, 128, (experts, n + 3, k), dtype=torch.int8)[:, :n]
    w = QuantizedWeight(codes, (0.5 + torch.rand(experts, -(-n // 3), 1)) / k**0.5 / 100, global_scales=0.5 + torch.rand(experts), format="int8", group=(3, k))
    a = torch.randint(-127, 128, (29, k + 5), dtype=torch.int8)[:, :k]
    return launch.Call(a, w, torch.tensor(counts, dtype=torch.int32), rows, torch.randn(experts, n), torch.randint(0, 29 * 2, (rows,), dtype=torch.int32),
                       gathered=True, slots=2, a_scales=0.01 + torch.rand(29) / 100, **options)


def reference(call: launch.Call) -> torch.Tensor:
    source = call.row_indices.long() // call.slots
    expert = torch.repeat_interleave(torch.arange(len(call.rows)), call.rows.long())
    numbers = call.a.double() * call.a_scales[:, None].double()
    sums = torch.einsum("rk,rnk->rn", numbers[source], call.w.dequantize(torch.float64)[expert]) + call.bias.double()[expert]
    sums = sums if call.activation is None else apply_activation(sums, call.activation)
    return sums if call.row_scales is None else sums * call.row_scales[:, None].double()


def check(call: launch.Call, config) -> None:
    want = reference(call)
    out = torch.full(want.shape, POISON)
    with force_config(config), Submission(queue_for(out.device), out.device) as submission:
        launch.launch(submission, call, out)
    assert ((out - want).abs() <= 2e-6 * (want.abs() + want.square().mean().sqrt())).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("activation, n", [(OAI, 78), (SILU, 78), (None, 35)], ids=["interleaved", "halves", "none"])
def test_instruction_sets(activation, n, isa):
    """Several blocks of K and a tail, rows that are read in place and packed ones."""
    scales = torch.rand(sum(COUNTS))
    check(make(n, 150, activation=activation, row_scales=scales, row_scale=RowScale.outputs), cpu(isa, tile_width=48))


@pytest.mark.parametrize("isa", [USABLE_ISAS[-1], *(pytest.param(isa, marks=pytest.mark.full) for isa in USABLE_ISAS[:-1] if isa != "baseline")])
def test_the_largest_sums(isa):
    """All products have the same sign: int32 holds the longest sums. The baseline sums floats."""
    call = make(6, 65536, [9])
    call.a[:] = torch.tensor([127, -127], dtype=torch.int8).repeat(15)[:29, None]
    call.w.codes[:] = torch.tensor([127, -128, 0, 1, 127, -128], dtype=torch.int8)[:, None]
    check(call, cpu(isa, k_block=512))


GUARDED = '''
from dataclasses import replace
import sys
from tests.kernels.before_a_hole import before_a_hole
from tests.kernels.test_int8_cpu_device import check, cpu, make

call = make(35, 150)
call = replace(call, **{name: before_a_hole(getattr(call, name)) for name in ("a", "a_scales", "bias", "row_indices")},
               w=replace(call.w, **{name: before_a_hole(getattr(call.w, name)) for name in ("codes", "scales", "global_scales")}))
check(call, cpu(sys.argv[1]))
print("within bounds")
'''


@pytest.mark.parametrize("isa", [ISA, *(pytest.param(isa, marks=pytest.mark.full) for isa in USABLE_ISAS if isa != ISA)])
def test_reads_end_with_codes_and_scales(isa):
    done = subprocess.run([sys.executable, "-c", GUARDED, isa], text=True, capture_output=True, cwd=Path(__file__).parents[2], timeout=200)
    assert done.stdout.strip() == "within bounds", (done.returncode, done.stderr[-2000:])
