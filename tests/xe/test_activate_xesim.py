"""The activations' BMG machine code, executed by xesim; memory around the operands is unmapped there."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_xe.isa.listing import summarize
from moe_xe.jit.activate_source import activate_source
from moe_xe.ops.block.activate import ActivationGradients
from moe_xe.ops.checks import DTYPES
from moe_xe.plan.block.activate import ActivateProblem, activate_groups, lane_columns, sub_groups
from moe_xe.plan.problem import Activation, ActivationKind, Dtype

from ..ops.block.test_activate import (BF16, F16, F32, HALVES, INTERLEAVED, KINDS, PLAIN, POISON, Kind, assert_close, check, make,
                                 reference, strided)
from .case import missing
from .test_token_sort_xesim import build, rows, run, stored

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


def launch(kind: Kind, arguments: dict, columns: int, *, gap: int = 0, want=ActivationGradients._fields) -> ActivationGradients:
    """The kernel into poisoned rows. columns: of a lane, as launch_activate finds them for aligned memory."""
    z, g, scales, pairs = arguments["z"], arguments["g"], arguments["row_scales"], arguments["row_pairs"]
    poisoned = lambda *shape, dtype: strided(torch.full(shape, POISON, dtype=dtype), gap)
    dz = poisoned(*z.shape, dtype=kind.dz) if "dz" in want else None
    hs = poisoned(len(z), kind.size, dtype=kind.hs) if "hs" in want else None
    dscale = torch.full((len(z),), POISON, dtype=F32) if "dscale" in want else None
    dtype = lambda tensor: None if tensor is None else DTYPES[tensor.dtype]
    problem = ActivateProblem(kind.size, kind.activation, dtype(z), dtype(g), dtype(dz), dtype(hs), dscale is not None,
                              scales is not None, pairs is not None, columns)
    matrices = [x for x in (z, g, dz, hs) if x is not None]
    assert lane_columns(kind.size, [(0, x.stride(0), DTYPES[x.dtype]) for x in matrices]) >= columns
    run(activate_source(problem, isa=None), *activate_groups(problem, len(z), is_cpu=False, cores=20),
        [*rows(z), *rows(g), stored(scales), stored(pairs), *rows(dz), *rows(hs), stored(dscale), np.int64(len(z))], seed=len(z))
    for matrix in (dz, hs):
        assert matrix is None or (matrix._base[:, matrix.shape[1]:] == POISON).all(), "written between rows"
    return ActivationGradients(dz, hs, dscale)


# the CPU device runs all of them by default (tests/ops/block/test_activate.py)
FEW = {("gelu_tanh", PLAIN), ("relu2", HALVES)}      # test_wide_accesses has silu and swiglu_oai; gelu takes twenty seconds


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * ((kind.kind, kind.layout) not in FEW)) for kind in KINDS], ids=str)
def test_every_activation(kind):
    arguments = make(kind, 5, gap=1, unused=0.3)
    check(kind, arguments, launch(kind, arguments, columns=1, gap=1))


# one and several sub-groups a row, the last one's vectors whole or not
@pytest.mark.parametrize("kind, columns", [
    (Kind("silu", HALVES, 8 * 16 * 16 + 8, BF16, BF16, BF16, BF16), 8), (Kind("swiglu_oai", INTERLEAVED, 1100, BF16, F32, BF16, BF16, 1.5), 4),
    *(pytest.param(*case, marks=pytest.mark.full) for case in ((Kind("gelu_tanh", HALVES, 130, F32, BF16, F16, F32), 2),
        (Kind("silu", INTERLEAVED, 2880, F16, BF16, BF16, F16), 8), (Kind("gelu", PLAIN, 128, F32, F32, F32, F32), 4),
        (Kind("relu2", INTERLEAVED, 16, BF16, BF16, BF16, BF16), 8), (Kind("gelu", INTERLEAVED, 38, BF16, BF16, BF16, BF16), 2)))], ids=str)
def test_wide_accesses(kind, columns):
    arguments = make(kind, 3, gap=columns)
    check(kind, arguments, launch(kind, arguments, columns, gap=columns))


@pytest.mark.parametrize("want", [("dz",), ("hs",), ("dscale",)])
def test_wanted(want):
    kind = Kind("silu", HALVES, 600, BF16, F32, BF16, BF16)
    arguments = make(kind, 4, scales=False)
    if want == ("hs",):
        arguments["g"] = None
    got = launch(kind, arguments, 4, want=want)
    wanted = reference(kind, **arguments | dict(g=torch.zeros(4, 600) if arguments["g"] is None else arguments["g"]))
    assert_close(getattr(got, *want), getattr(wanted, *want))
    assert sum(x is not None for x in got) == 1


def test_columns_of_a_lane():
    bf16, f32 = Dtype.bf16, Dtype.f32
    assert lane_columns(2880, [(64, 5760, bf16), (64, 2880, bf16)]) == 8
    assert lane_columns(2880, [(64, 5760, bf16), (64, 2880, f32)]) == 4
    assert lane_columns(2880, [(64, 5760, bf16), (8, 2880, bf16)]) == 4
    assert lane_columns(2880, [(64, 5762, bf16)]) == 2
    assert lane_columns(2881, [(64, 5762, bf16)]) == 1
    assert lane_columns(2880, [(2, 5760, bf16)]) == 1


def test_work_groups():
    problem = ActivateProblem(2880, Activation(), Dtype.bf16, columns=8)
    assert sub_groups(problem) == 8 and activate_groups(problem, 100, is_cpu=False, cores=20) == (100, 128)
    assert activate_groups(ActivateProblem(16, Activation(), Dtype.bf16), 7, is_cpu=False, cores=20) == (7, 16)
    assert activate_groups(problem, 100, is_cpu=True, cores=20) == (12, 1)


BF16_TRAINING = (Dtype.bf16,) * 4
PROBLEMS = [ActivateProblem(2880, Activation(ActivationKind(kind), *layout, 1.702, 7.0), *BF16_TRAINING, True, True, True, 8)
            for kind, layout in (("silu", HALVES), ("gelu", HALVES), ("gelu_tanh", INTERLEAVED), ("swiglu_oai", INTERLEAVED))]
PROBLEMS += [ActivateProblem(2880, Activation(), *(Dtype.f32,) * 4, True, True, True, 4),
             ActivateProblem(2881, Activation(interleaved=True), Dtype.bf16, Dtype.f32, Dtype.f16, Dtype.bf16, True, True, True, 1),
             ActivateProblem(2880, Activation(), Dtype.bf16, hs=Dtype.bf16, has_row_pairs=True, columns=8)]


@pytest.mark.few(2)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("problem", [PROBLEMS[0], *(pytest.param(p, marks=pytest.mark.full) for p in PROBLEMS[1:3]), PROBLEMS[3],
                                     pytest.param(PROBLEMS[4], marks=pytest.mark.full), *PROBLEMS[5:]], ids=lambda p: f"{p.activation.kind.value}-{p.columns}-{'all' if p.dscale else 'forward'}")
def test_no_spills(problem, device):
    summary = summarize(build(activate_source(problem, isa=None), device), "activate")
    assert (summary.spill_bytes, summary.private_bytes, summary.stack_calls, summary.undefined) == (0, 0, False, ())
