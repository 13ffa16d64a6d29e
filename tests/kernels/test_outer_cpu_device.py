"""The weights' gradient's main loops for the CPU device and for any GPU, run on the CPU device against float64."""
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_xe.device import queue_for
from moe_xe.isa import spirv
from moe_xe.jit import sources_dir
from moe_xe.jit.outer_source import generate
from moe_xe.ops.calls import known_calls
from moe_xe.ops.gemm import grouped_outer as ops
from moe_xe.plan.outer.config import OuterConfig, OuterGenericConfig, OuterProblem
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import FLOATS, Dtype

from .test_mainloops_cpu_device import DTYPES, EACH_ISA, POISON, USABLE_ISAS, padded, quick

COUNTS = [5, 0, 1, 47, 2, 33, 18]      # no row, one, odd ones, several row blocks
SOURCES = 23                           # rows of a gathered operand


def cpu(isa: str = USABLE_ISAS[-1], **changes) -> OuterConfig:
    """The CPU device's configuration with small tiles, so that small shapes have several of each kind."""
    return replace(cpu_outer_config(isa), **{"tile_rows": 20, "tile_columns": 96, "row_block": 16, **changes})


def generic(**changes) -> OuterConfig:
    """Small: the CPU device's compiler takes long over large sub-group blocks."""
    return replace(OuterGenericConfig(8, 32, 1, sub_group_rows=4, sub_group_columns=16), **changes)


CONFIGS = {"cpu": cpu(), "generic": generic()}
QUICK = quick(cpu, generic)


@dataclass
class Case:
    left: torch.Tensor
    right: torch.Tensor
    counts: list[int]
    indices: torch.Tensor | None = None
    gathered: str = "none"
    divisor: int = 1
    out_dtype: torch.dtype | None = None
    before: torch.Tensor | None = None     # accumulated to
    gap: int = 0

    def total_rows(self) -> int:
        return (self.left if self.indices is None else self.indices).shape[0]

    def run(self, config: OuterConfig) -> torch.Tensor:
        """Also checks that nothing around the output was written."""
        experts, p, q = len(self.counts), self.left.shape[1], self.right.shape[1]
        whole = torch.full((experts * p + 2, q + self.gap), POISON, dtype=self.out_dtype or self.left.dtype)
        out = whole[1:-1, :q].fill_(float("nan")).unflatten(0, (experts, p))
        if self.before is not None:
            out.copy_(self.before)
        with force_config(config):
            ops.grouped_outer(self.left, self.right, torch.tensor(self.counts, dtype=torch.int32), out=out,
                              gather_divisor=self.divisor, accumulate=self.before is not None,
                              **({} if self.indices is None else {f"gather_indices_{self.gathered}": self.indices}))
        assert (whole[[0, -1]] == POISON).all() and (whole[:, q:] == POISON).all()
        return out

    def reference(self) -> torch.Tensor:
        """Counts as the kernel takes them: negative ones are none, rows beyond the last are left out."""
        left, right = (operand[self.indices.long() // self.divisor] if self.gathered == side else operand
                       for side, operand in (("left", self.left), ("right", self.right)))
        products, begin = [], 0
        for count in self.counts:
            end = min(begin + max(count, 0), self.total_rows())
            products.append(left[begin:end].double().T @ right[begin:end].double())
            begin = end
        products = torch.stack(products)
        return products if self.before is None else products + self.before.to(self.out_dtype or self.left.dtype).double()

    def check(self, config: OuterConfig) -> None:
        assert_right(self.run(config), self.reference(), self.total_rows())


def assert_right(out: torch.Tensor, reference: torch.Tensor, rows: int) -> None:
    """Element by element: one rounding to the type, and sums of `rows` products in float32."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[out.dtype]
    torch.testing.assert_close(out.double(), reference, rtol=1.01 * rounding, atol=2e-7 * (rows + 8))


def make(counts=COUNTS, p=45, q=101, dtype=torch.bfloat16, gathered="none", divisor=1, accumulate=False, gap=0, **fields) -> Case:
    rows = sum(count for count in counts if count > 0)
    left, right = (padded(SOURCES if gathered == side else rows, columns, dtype=dtype, gap=gap)
                   for side, columns in (("left", p), ("right", q)))
    indices = None if gathered == "none" else torch.randint(0, SOURCES * divisor, (rows,), dtype=torch.int32)
    before = torch.randn(len(counts), p, q) if accumulate else None
    return Case(left, right, list(counts), indices, gathered, divisor, before=before, gap=gap, **fields)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("gathered", ["left", "right"])
@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.full)], ids=str)
def test_everything_at_once(config, gathered, dtype):
    make(dtype=dtype, gathered=gathered, divisor=3, accumulate=True, gap=3).check(config)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.full)])
def test_rows_of_several_ranks(config, splits):
    """The sums of the rows sorted by expert, in their order."""
    table = torch.tensor([[5, 0, 1, 47], [0, 0, 0, 0], [2, 0, 33, 18]], dtype=torch.int32)
    order = torch.arange(4).repeat(3).repeat_interleave(table.flatten()).argsort(stable=True)
    left, right = (torch.randn(len(order), columns) for columns in (45, 101))
    with force_config(replace(config, splits=splits)):
        found = ops.grouped_outer(left, right, table)
        assert torch.equal(found, ops.grouped_outer(left[order], right[order], table.sum(0, dtype=torch.int32)))
    parts = (x[order].double().split(table.sum(0).tolist()) for x in (left, right))
    assert_right(found, torch.stack([x.T @ y for x, y in zip(*parts)]), len(order))


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa, dtype):
    make(p=43, q=133, dtype=dtype).check(cpu(isa))


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512"])
def test_wide_instruction_sets_compile(isa, dtype):
    """Also where this CPU cannot run them."""
    text = generate(OuterProblem(100, 150, dtype, dtype), cpu_outer_config(isa))
    image = spirv.compile_to_spirv(text, [f"-I{sources_dir()}/include", f"-I{sources_dir()}"])
    assert (b"vdpbf16ps" in image) == (isa == "avx512_bf16" and dtype is Dtype.bf16)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("p, q", [(1, 1), (1, 40), (17, 3)])
def test_small_shapes(config, p, q):
    make(p=p, q=q).check(config)


@pytest.mark.full
@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("output", [torch.float16, torch.float32], ids=str)
def test_other_outputs(config, output):
    make(out_dtype=output).check(config)


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [*QUICK, pytest.param(cpu(row_block=4096), id="cpu, one row block")])
def test_row_counts_share_a_kernel(config):
    """One kernel, many distributions."""
    for counts in ([1], [0, 0, 9], [21] * 3, [3] * 40, [0] * 511 + [7], [int(c) for c in torch.randint(0, 4, (512,))]):
        make(counts, 25, 40).check(config)


@pytest.mark.parametrize("config", QUICK)
def test_rows_shared_out(config):
    """Parts of an expert may have no rows, or not whole steps."""
    make([5, 0, 1, 97, 64], dtype=torch.bfloat16, gathered="left").check(replace(config, splits=3))


@settings(settings.get_profile("compiling"))
@given(p=st.integers(1, 60), q=st.integers(1, 200), counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
       dtype=st.sampled_from(DTYPES), gathered=st.sampled_from(["none", "left", "right"]), accumulate=st.booleans(),
       gap=st.integers(0, 5))
def test_any_shape(p, q, counts, dtype, gathered, accumulate, gap):
    make(counts, p, q, dtype, gathered, 2, accumulate, gap).check(cpu())


@pytest.mark.parametrize("config", QUICK)
@pytest.mark.parametrize("counts", [[5, -3, 7, 2**31 - 1], [40, 40, 40], [-(2**31), 3, 0]])
def test_wrong_counts_touch_nothing_outside(config, counts):
    case = make([4, 3, 6, 17], 25, 40, gap=2)
    case.counts = counts
    case.check(config)


@pytest.mark.parametrize("config", QUICK)
def test_wrong_indices_read_a_row(config):
    """NaN is around the operand's rows."""
    case = make(gathered="left")
    case.indices[::3] = torch.tensor([-1, SOURCES, 2**31 - 1, -(2**31)], dtype=torch.int32).repeat(20)[:len(case.indices[::3])]
    assert case.run(replace(config, splits=3)).isfinite().all()      # the kernel of rows that are shared out


@pytest.mark.parametrize("config", QUICK)
def test_special_values_stay_where_they_are(config):
    """inf and NaN of an expert's last, odd row meet only its own factors; rounding is to nearest even."""
    left, right = torch.zeros(6, 25, dtype=torch.bfloat16), torch.zeros(6, 40, dtype=torch.bfloat16)
    left[:, 0], right[:, 0] = 1, torch.tensor([1, 0, 0, 2**-8, float("inf"), float("nan")])
    out = Case(left, right, [3, 2, 1]).run(config)
    assert out[:, 0, 0].tolist()[:2] == [1, float("inf")] and out[2, 0, 0].isnan()
    left[0, 0] = right[3, 0] = 1 + 2**-7
    right[1:, 0], left[1, 0], right[1, 0] = 0, 2**-8, 1
    out = Case(left, right, [6]).run(config)
    assert out[0, 0, 0].item() == 1 + 2**-6      # 1 + 2^-7 + 2^-8 is in the middle


@pytest.mark.few(1)
@pytest.mark.parametrize("config", QUICK)
def test_results_do_not_depend_on_who_computes_them(config, monkeypatch):
    case = make(dtype=torch.float32)
    expected = case.run(config)
    for groups in (1, 7):
        target = replace(ops.target_of(ops.facts_of(queue_for(torch.device("cpu")))), cores=groups)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "target_of", lambda facts: target)
            known_calls().clear()      # of another number of cores
            assert torch.equal(case.run(config), expected)


@pytest.mark.parametrize("config", QUICK)
def test_offsets_beyond_31_bits(config):
    """Memory that is never touched costs nothing, so the strides can be large."""
    p, q, stride, rows = 25, 40, 2**30 + 8, 4

    def far(*shape: int) -> torch.Tensor:
        strides = [stride] + [shape[-1]] * (len(shape) - 2) + [1]
        return torch.empty(stride * (shape[0] - 1) + 2**20, dtype=torch.bfloat16).as_strided(shape, strides)

    left, right, out = far(rows, p), far(rows, q), far(3, p, q)
    case = Case(left.copy_(torch.randn(rows, p)), right.copy_(torch.randn(rows, q)), [0, 1, 3])
    with force_config(config):
        ops.grouped_outer(left, right, torch.tensor(case.counts, dtype=torch.int32), out=out)
    assert_right(out, case.reference(), rows)


GUARDED = '''
import sys
import torch
from tests.kernels.before_a_hole import before_a_hole
from tests.kernels.test_outer_cpu_device import CONFIGS, make

for name, gathered in zip(sys.argv[1:], 2 * ("left", "right")):
    case = make(dtype=getattr(torch, name), gathered=gathered, divisor=3, accumulate=True)
    case.left, case.right, case.indices = map(before_a_hole, (case.left, case.right, case.indices))
    case.check(CONFIGS["cpu"])
print("within bounds")
'''


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), pytest.param(("float16", "bfloat16", "float32", "float16"), marks=pytest.mark.full)], ids=str)
def test_reads_end_with_the_operands(dtypes):
    done = subprocess.run([sys.executable, "-c", GUARDED, *dtypes], text=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "within bounds", (done.returncode, done.stderr[-2000:])
