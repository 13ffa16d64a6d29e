"""What the CPU device's main loop fuses, with each instruction set and small tiles: pairs, activations, scattered rows."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_xe.bench.numerics import difference
from moe_xe.device import queue_for
from moe_xe.ops.block.activation import apply_activation
from moe_xe.ops.launch import Call, SharedWeights, launch
from moe_xe.ops.submission import Submission
from moe_xe.plan.gemm.config import TileConfig
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Activation, ActivationKind, RowScale

from .test_mainloops_cpu_device import COUNTS, EACH_ISA, LAYOUTS, POISON, USABLE_ISAS, cpu, generic, padded

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SILU = Activation()
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
NO_GATE = Activation(ActivationKind.relu2, gated=False)
LIMITS = {BF16: (8e-3, 1e-5), F16: (1e-3, 2e-7), F32: (1e-5, 1e-11)}     # relative to the value or the RMS; to the whole


@dataclass
class Case:
    """A call and where it writes; w is [E, N, K] whatever the memory order, and has the shared experts first."""
    call: Call
    w: torch.Tensor
    d_rows: int
    out_dtype: torch.dtype
    gap: int

    def reference(self) -> torch.Tensor:
        """[d_rows, columns] in float64; POISON where nothing is written."""
        call, counts = self.call, self.call.rows.tolist()
        act, pairs = call.activation, call.row_indices
        columns = self.w.shape[1] // (2 if act is not None and act.gated else 1)
        out = torch.full((self.d_rows, columns), POISON, dtype=torch.float64)
        group = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        num_shared = 0 if call.shared is None else call.shared.count
        for row, expert in enumerate(group.tolist()):
            target = int(pairs[row]) if call.scattered else row
            if target < 0:
                continue
            sums = self.w[expert].double() @ call.a[int(pairs[row]) // call.slots if call.gathered else row].double()
            sums = sums * call.row_scales[row] if call.row_scale is RowScale.sums else sums
            sums = sums if call.bias is None or expert < num_shared else sums + call.bias[expert - num_shared].double()
            value = sums if act is None else apply_activation(sums, act)
            out[target] = value * call.row_scales[row] if call.row_scale is RowScale.outputs else value
        return out

    def check(self, config: TileConfig) -> None:
        """Also that nothing around the output was written, nor a row that nothing belongs to."""
        expected = self.reference()
        whole = torch.full((self.d_rows + 2, expected.shape[1] + self.gap), POISON, dtype=self.out_dtype)
        out = whole[1:-1, :expected.shape[1]]
        with force_config(config):
            with Submission(queue_for(out.device), out.device) as submission:
                launch(submission, self.call, out)
        assert (whole[[0, -1]] == POISON).all() and (whole[:, expected.shape[1]:] == POISON).all()
        unwritten = (expected == POISON).all(1)
        assert (out[unwritten] == POISON).all()
        got, want = out[~unwritten].double(), expected[~unwritten]
        max_error, calc_diff = LIMITS[self.out_dtype]
        rms = want.square().mean().sqrt()
        assert ((got - want).abs() / (want.abs() + rms)).max() <= max_error, difference(got, want)
        assert difference(got, want).calc_diff <= calc_diff


def stored(w: torch.Tensor, layout: str, gap: int) -> torch.Tensor:
    """The same weights in memory of that layout, NaN between the rows."""
    if layout == "enk":
        return padded(*w.shape, dtype=w.dtype, gap=gap).copy_(w)
    return padded(w.shape[0], w.shape[2], w.shape[1], dtype=w.dtype, gap=gap).copy_(w.transpose(1, 2)).transpose(1, 2)


def make(layout="enk", dtype=F32, activation: Activation | None = None, counts=COUNTS, n=102, k=149, gap=3, out_dtype=None, bias=None,
         scattered=False, slots=3, row_scale=RowScale.none, shared=0) -> Case:
    """The first GEMM (gathered) or the second one (scattered); sorted rows beyond the counts have index -1."""
    rows, num_routed = sum(counts) + 4, len(counts) - shared
    w = (torch.randn(len(counts), n, k) / k**0.5).to(dtype)
    a = padded(rows if scattered else -(-rows // slots), k, dtype=dtype, gap=gap)
    d_rows = rows + 3 if scattered else rows
    pairs = torch.randperm(d_rows)[:rows] if scattered else torch.randint(0, len(a) * slots, (rows,))
    pairs[torch.rand(rows) < 0.05 if scattered else slice(0)] = -1
    pairs[sum(counts):] = -1
    call = Call(a, stored(w[shared:], layout, gap), torch.tensor(counts, dtype=torch.int32), rows,
                None if bias is None else padded(num_routed, n, dtype=bias, gap=gap), pairs.int(), gathered=not scattered, scattered=scattered,
                slots=1 if scattered else slots, row_scales=torch.rand(rows), row_scale=row_scale, activation=activation,
                shared=None if not shared else shared_weights(w[:shared], activation, gap))
    return Case(call, w, d_rows, out_dtype or dtype, gap)


def shared_weights(w: torch.Tensor, activation: Activation | None, gap: int) -> SharedWeights:
    """[E, N, K] in memory, gates and up values apart; a second GEMM's side by side."""
    count, n, k = w.shape
    if activation is not None and activation.gated:
        gate, up = (padded(count * n // 2, k, dtype=w.dtype, gap=gap).copy_(half.reshape(-1, k)) for half in w.chunk(2, 1))
        return SharedWeights(gate, up, gate.stride(0), n // 2 * gate.stride(0), count)
    side_by_side = padded(n, count * k, dtype=w.dtype, gap=gap).copy_(w.transpose(0, 1).reshape(n, -1))
    return SharedWeights(side_by_side, None, side_by_side.stride(0), k, count)


FIRST = {"halves": dict(activation=SILU), "interleaved": dict(activation=OAI, bias=BF16), "no gate": dict(activation=NO_GATE, row_scale=RowScale.sums)}


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FIRST)
def test_first_gemm(name, layout, isa):
    """float32 with the narrowest instructions, bf16 with the others: whole blocks of each and tails. Fewer rows a block than
    by default compile sooner."""
    make(layout, F32 if isa == "baseline" else BF16, **FIRST[name]).check(cpu(isa, tile_width=64, micro_rows=5))


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_gemm(layout, isa):
    make(layout, BF16, scattered=True, out_dtype=F32, row_scale=RowScale.outputs, bias=F32).check(cpu(isa, tile_width=64, micro_rows=5))


@pytest.mark.full
@pytest.mark.parametrize("output, bias", [(BF16, F16), (F16, None)], ids=str)
def test_second_gemm_of_other_types(output, bias):
    make("ekn", output, scattered=True, bias=bias, row_scale=RowScale.outputs).check(cpu("avx2" if "avx2" in USABLE_ISAS else "baseline"))


@pytest.mark.few(2)
@pytest.mark.parametrize("changes", [dict(tile_width=96), dict(tile_width=192, k_block=4096), dict(tile_width=48, micro_columns=16, micro_rows=3, dot_rows=1),
                                     dict(heights=(7,), unpacked_rows=1), dict(unpacked_rows=9, dot_rows=2, prefetch_columns=0)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [SILU, OAI], ids=["halves", "interleaved"])
def test_tiles_of_pairs(activation, layout, changes):
    make(layout, F16, activation, n=98, gap=1).check(cpu("avx2" if "avx2" in USABLE_ISAS else "baseline", **{"tile_width": 64, **changes}))


@pytest.mark.few(1)
@pytest.mark.parametrize("n, k", [(2, 1), (6, 17)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [SILU, OAI], ids=["halves", "interleaved"])
def test_small_shapes_of_pairs(activation, layout, n, k):
    make(layout, F32, activation, n=n, k=k, bias=F32).check(cpu("baseline"))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_shared_experts(second, shared):
    fields = dict(scattered=True, row_scale=RowScale.outputs) if second else dict(activation=SILU)
    make("enk", F32, counts=[9, 9, *COUNTS], bias=F32, shared=shared, **fields).check(cpu("baseline"))


@pytest.mark.few(1)
@pytest.mark.parametrize("layout, fields", [("enk", dict(activation=SILU, shared=1)), ("ekn", dict(activation=OAI, bias=BF16)),
                                            ("enk", dict(scattered=True, row_scale=RowScale.outputs, out_dtype=F32))], ids=["halves", "interleaved", "scattered"])
def test_generic_main_loop(layout, fields):
    """Outputs in bf16: a GPU's functions for powers and reciprocals are coarse on the CPU device."""
    make(layout, BF16, **fields).check(generic(sub_group_columns=(32,)))


GUARDED = '''
import sys
from dataclasses import replace
from tests.kernels.before_a_hole import before_a_hole
from tests.kernels.test_fused_epilogues_cpu_device import *

FUSED = (dict(activation=SILU, bias=F32), dict(dtype=BF16, activation=OAI, bias=BF16), dict(dtype=F16, scattered=True, row_scale=RowScale.outputs))
for layouts, fields in zip(sys.argv[1:], FUSED):
    for layout in layouts.split():
        case = make(layout, gap=0, **fields)
        call = case.call
        w = before_a_hole(call.w) if layout == "enk" else before_a_hole(call.w.transpose(1, 2)).transpose(1, 2)
        case.call = replace(call, w=w, **{name: before_a_hole(getattr(call, name)) for name in ("a", "bias", "row_indices", "row_scales", "rows")
                                          if getattr(call, name) is not None})
        case.check(cpu(micro_rows=5))
print("within bounds")
'''


@pytest.mark.full
@pytest.mark.parametrize("layouts", [("enk", "ekn", "enk ekn"), pytest.param(("ekn", "enk", ""), marks=pytest.mark.full)], ids=str)
def test_reads_end_with_the_operands(layouts):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", GUARDED, *layouts], text=True, capture_output=True, cwd=root)
    assert done.stdout.strip() == "within bounds", (done.returncode, done.stderr[-2000:])
