"""The CPU device's main loop and the generic one, run on the SYCL CPU device against references in float64."""
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_xe
from moe_xe import runtime
from moe_xe.bench.numerics import agrees, difference
from moe_xe.isa import spirv
from moe_xe.jit import sources_dir
from moe_xe.jit.source import generate
from moe_xe.ops.calls import known_calls
from moe_xe.ops import launch
from moe_xe.plan.gemm.config import TILE_INPUTS, GenericConfig, Schedule, TileConfig
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, WeightLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["enk", "ekn"]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]        # each includes those before it
USABLE_ISAS = ISAS[:ISAS.index(runtime.cpu_isa()) + 1] if runtime.cpu_isa() in ISAS else ISAS      # test_tiles_cpu_device.py has AMX
EACH_ISA = [*USABLE_ISAS[:-1], pytest.param(USABLE_ISAS[-1], marks=pytest.mark.full)]      # the last one is what cpu() has: most tests
COUNTS = [5, 0, 1, 47, 2, 3, 18]                           # every path: no row, dot products, packed, several row tiles
POISON = 777.0


def cpu(isa: str = USABLE_ISAS[-1], **changes) -> TileConfig:
    """The CPU device's configuration with small tiles, so that small shapes have several of each kind."""
    dtype = TILE_INPUTS.get(isa, (Dtype.bf16,))[0]
    return replace(cpu_config(GroupedGemmProblem(64, 64, dtype, dtype), isa), **{"heights": (20,), "tile_width": 96, "k_block": 64, **changes})


def generic(**changes) -> TileConfig:
    """Small: the CPU device's compiler takes long over large sub-group blocks."""
    return replace(GenericConfig(heights=(8,), tile_width=32, raster_group=2, min_fill_eighths=8, schedule=Schedule.dynamic,
                                 sub_group_rows=(4,), sub_group_columns=(16,)), **changes)


CONFIGS = {"cpu": cpu(), "generic": generic()}


def quick(cpu, generic) -> list:
    """A configuration of each, by these functions; for the CPU's best instructions, which take three times as long to compile, with --full."""
    return [pytest.param(cpu(USABLE_ISAS[:2][-1]), id="cpu"), pytest.param(cpu(), id="cpu, best", marks=pytest.mark.full),
            pytest.param(generic(), id="generic")]


QUICK = quick(cpu, generic)


def padded(*shape: int, dtype: torch.dtype, gap: int) -> torch.Tensor:
    """Random values with NaN around: a read outside a row shows."""
    rows, columns = shape[-2:]
    whole = torch.full((*shape[:-2], rows + 2, columns + gap), float("nan"), dtype=dtype)
    view = whole[..., 1:1 + rows, :columns]
    return view.copy_(torch.randn(shape))


@dataclass
class Case:
    a: torch.Tensor
    w: torch.Tensor            # [E, N, K], whatever the memory order
    counts: list[int]
    bias: torch.Tensor | None = None
    gather_indices: torch.Tensor | None = None
    gap: int = 0
    out_dtype: torch.dtype | None = None

    def rows(self) -> int:
        return self.a.shape[0] if self.gather_indices is None else self.gather_indices.shape[0]

    def run(self, config: TileConfig) -> torch.Tensor:
        """Also checks that nothing around the output was written."""
        n = self.w.shape[1]
        whole = torch.full((self.rows() + 2, n + self.gap), POISON, dtype=self.out_dtype or self.a.dtype)
        out = whole[1:-1, :n]
        with force_config(config):
            moe_xe.grouped_gemm(self.a, self.w, torch.tensor(self.counts, dtype=torch.int32), bias=self.bias,
                                gather_indices=self.gather_indices, out=out, schedule=config.schedule.value)
        assert (whole[[0, -1]] == POISON).all() and (whole[:, n:] == POISON).all()
        return out

    def reference(self) -> torch.Tensor:
        """Counts as the kernel takes them: negative ones are none, rows beyond the last are left out."""
        a = self.a if self.gather_indices is None else self.a[self.gather_indices.long()]
        parts, begin = [], 0
        for expert, count in enumerate(self.counts):
            end = min(begin + max(count, 0), self.rows())
            part = a[begin:end].double() @ self.w[expert].double().T
            parts.append(part if self.bias is None else part + self.bias[expert].double())
            begin = end
        parts.append(torch.full((self.rows() - begin, self.w.shape[1]), POISON, dtype=torch.float64))
        return torch.cat(parts)

    def check(self, config: TileConfig) -> None:
        out, reference = self.run(config), self.reference()
        found = difference(out, reference)
        assert found.calc_diff < 1e-5 and agrees(out, reference, self.a.shape[1]), found


def make(counts=COUNTS, n=101, k=149, dtype=torch.bfloat16, layout="enk", gap=0, bias=None, gathered=False, **fields) -> Case:
    rows = sum(count for count in counts if count > 0)
    a = padded(23 if gathered else rows, k, dtype=dtype, gap=gap)
    w = padded(len(counts), n, k, dtype=dtype, gap=gap) if layout == "enk" else \
        padded(len(counts), k, n, dtype=dtype, gap=gap).transpose(1, 2)
    return Case(a, w, counts, bias=None if bias is None else padded(len(counts), n, dtype=bias, gap=gap), gap=gap,
                gather_indices=torch.randint(0, 23, (rows,), dtype=torch.int32) if gathered else None, **fields)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.full)], ids=str)
def test_everything_at_once(config, layout, dtype):
    make(dtype=dtype, layout=layout, gap=3, bias=torch.float32, gathered=True).check(config)


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa, layout, dtype):
    make(n=70, k=133, dtype=dtype, layout=layout).check(cpu(isa, tile_width=64))


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512"])
def test_wide_instruction_sets_compile(isa, dtype):
    """Also where this CPU cannot run them."""
    name = Dtype({torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype])
    text = generate(GroupedGemmProblem(100, 150, name, name, WeightLayout.enk), cpu_config(GroupedGemmProblem(100, 150, name, name), isa))
    image = spirv.compile_to_spirv(text, [f"-I{sources_dir()}/include", f"-I{sources_dir()}"])
    assert (b"vdpbf16ps" in image) == (isa == "avx512_bf16" and dtype == torch.bfloat16)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 17)])
def test_small_shapes(config, n, k):
    make(n=n, k=k).check(config)


@pytest.mark.full
@pytest.mark.parametrize("output", [torch.float16, torch.float32], ids=str)
def test_other_outputs(output):
    make(bias=torch.bfloat16, out_dtype=output).check(cpu())


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [*QUICK, pytest.param(cpu(k_block=4096), id="cpu, one K block")])
def test_row_counts_share_a_kernel(config):
    """One kernel, many distributions."""
    n, k = 50, 200
    for counts in ([1], [0, 0, 9], [21] * 3, [3] * 40, [0] * 511 + [7], [int(c) for c in torch.randint(0, 4, (512,))]):
        make(counts, n, k).check(config)


@settings(settings.get_profile("compiling"))
@given(n=st.integers(1, 200), k=st.integers(1, 300), counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
       dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), gap=st.integers(0, 5))
def test_any_shape(n, k, counts, dtype, layout, gap):
    make(counts, n, k, dtype, layout, gap).check(cpu())


@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("counts", [[5, -3, 7, 2**31 - 1], [40, 40, 40], [-(2**31), 3, 0]])
def test_wrong_counts_touch_nothing_outside(config, counts):
    case = make([4, 3, 6, 17], 50, 200, gap=2)
    case.counts, case.w = counts, case.w[:len(counts)]
    case.check(config)


@pytest.mark.parametrize("config", QUICK)
def test_special_values(config):
    """inf and NaN are kept, and rounding is to nearest even."""
    k = 40
    a = torch.zeros(8, k, dtype=torch.float32)
    a[:, 0] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, -0.0, 2.0**-130])
    w = torch.zeros(1, 33, k)
    w[:, :, 0] = 1
    out = Case(a, w, [8], out_dtype=torch.bfloat16).run(config)
    expected = a[:, :1].to(torch.bfloat16).expand(8, 33)
    assert torch.equal(torch.isnan(out), torch.isnan(expected))
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.full
@pytest.mark.parametrize("config", QUICK)
def test_results_do_not_depend_on_who_computes_them(config, monkeypatch):
    """As test_bitwise_equal of test_split_k_cpu_device.py, with K in one part."""
    case = make(n=50, k=200, dtype=torch.float32)
    expected = case.run(config)
    static = replace(config, schedule=Schedule.static)
    for groups in (1, 7):
        target = replace(launch.target_of(launch.facts_of(launch.queue_for(torch.device("cpu")))), cores=groups)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "target_of", lambda facts: target)
            known_calls().clear()      # of another number of cores
            assert torch.equal(case.run(config), expected)
            assert torch.equal(case.run(static), expected)


@pytest.mark.parametrize("config", QUICK)
def test_offsets_beyond_31_bits(config):
    """Memory that is never touched costs nothing, so the strides can be large."""
    n, k, stride, rows = 50, 200, 2**30 + 8, 4

    def far(*shape: int) -> torch.Tensor:
        strides = [stride] + [shape[-1]] * (len(shape) - 2) + [1]
        return torch.empty(stride * (shape[0] - 1) + 2**20, dtype=torch.bfloat16).as_strided(shape, strides)

    a, w, out = far(rows, k), far(3, n, k), far(rows, n)
    case = Case(a.copy_(torch.randn(a.shape)), w.copy_(torch.randn(w.shape)), [0, 1, 3])
    with force_config(config):
        moe_xe.grouped_gemm(a, w, torch.tensor(case.counts, dtype=torch.int32), out=out)
    assert agrees(out, case.reference(), k)


GUARDED = '''
import sys
import torch
from tests.kernels.before_a_hole import before_a_hole
from tests.kernels.test_mainloops_cpu_device import CONFIGS, LAYOUTS, make

for name, layout in zip(sys.argv[1:], 2 * LAYOUTS):
    case = make(dtype=getattr(torch, name), layout=layout, bias=torch.float32, gathered=True)
    case.a, case.bias, case.gather_indices = map(before_a_hole, (case.a, case.bias, case.gather_indices))
    case.w = before_a_hole(case.w) if layout == "enk" else before_a_hole(case.w.transpose(1, 2)).transpose(1, 2)
    case.check(CONFIGS["cpu"])
print("within bounds")
'''


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), pytest.param(("float16", "bfloat16", "float32", "float16"), marks=pytest.mark.full)], ids=str)
def test_reads_end_with_the_operands(dtypes):
    done = subprocess.run([sys.executable, "-c", GUARDED, *dtypes], text=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "within bounds", (done.returncode, done.stderr[-2000:])
