"""The CPU device's main loop over codes, against float64 sums of the numbers that codes are by definition."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_xe.device import queue_for
from moe_xe.isa import spirv
from moe_xe.jit import sources_dir
from moe_xe.jit.source import generate
from moe_xe.ops import launch
from moe_xe.ops.block.activation import apply_activation
from moe_xe.ops.calls import known_calls
from moe_xe.ops.submission import Submission
from moe_xe.plan.formats import FORMATS, Codes, Quantization, ScaleType
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.override import force_config
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale
from moe_xe.quantized import QuantizedWeight

from .test_fused_epilogues_cpu_device import LIMITS
from .test_mainloops_cpu_device import COUNTS, DTYPES, LAYOUTS, POISON, USABLE_ISAS, Case, cpu, padded

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ISA = USABLE_ISAS[:2][-1]       # kernels for avx512 take three times as long to compile


@dataclass(frozen=True)
class Kind:
    """A weight's format, its scales, and what it has besides."""
    format: str
    group: tuple[int, int]
    scales: torch.dtype | ScaleType
    zeros: bool = False
    global_scales: bool = False

    def __str__(self) -> str:
        return f"{self.format}-{self.group[0]}x{self.group[1]}{'-zeros' * self.zeros}"


WHOLE = 1 << 20     # longer than any row
KINDS = [
    Kind("mxfp4", (1, 32), ScaleType.e8m0), Kind("nvfp4", (1, 16), ScaleType.e4m3, global_scales=True),
    Kind("int4", (1, 128), F16, zeros=True), Kind("uint4", (3, 64), BF16), Kind("int4", (2, WHOLE), F32, global_scales=True),
    Kind("uint4", (1, 40), F32, zeros=True), Kind("int8", (1, WHOLE), BF16, zeros=True), Kind("int8", (1, 16), F16),
    Kind("fp8_e4m3", (128, 128), F32), Kind("fp8_e5m2", (2, 20), ScaleType.e8m0), Kind("mxfp8", (1, 32), ScaleType.e8m0)]
MAIN_KINDS = [KINDS[index] for index in (0, 2, 6, 8)]     # mxfp4, int4, int8, fp8_e4m3


def minifloat(bits: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Sign, exponent and mantissa as IEEE has them, without its infinities and NaN."""
    bits = bits.astype(np.int64)
    bias = 2**(exponent_bits - 1) - 1
    mantissa, exponent = bits % 2**mantissa_bits / 2**mantissa_bits, bits // 2**mantissa_bits % 2**exponent_bits
    size = np.where(exponent == 0, mantissa * 2.0**(1 - bias), (1 + mantissa) * 2.0**(exponent - bias))
    return np.where(bits >> (exponent_bits + mantissa_bits), -size, size)


def numbers_of(codes: Codes, data: np.ndarray) -> np.ndarray:
    """What bytes [.., bytes] are by definition, [.., K]."""
    if codes.bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    if codes in (Codes.int4, Codes.int8):
        return data - np.where(data >= 2**(codes.bits - 1), 2.0**codes.bits, 0.0)
    if codes is Codes.uint4:
        return data.astype(np.float64)
    if codes is Codes.e2m1:
        return minifloat(data, 2, 1)
    if codes is Codes.e5m2:
        special = np.where(data & 3, np.nan, np.where(data >> 7, -np.inf, np.inf))
        return np.where((data & 0x7C) == 0x7C, special, minifloat(data, 5, 2))
    return np.where((data & 0x7F) == 0x7F, np.nan, minifloat(data, 4, 3))


def grid_numbers(kind: Kind, grid: torch.Tensor) -> np.ndarray:
    if kind.scales is ScaleType.e8m0:
        return np.where(grid.numpy() == 255, np.nan, 2.0**(grid.numpy() - 127.0))
    return numbers_of(Codes.e4m3, grid.numpy()) if kind.scales is ScaleType.e4m3 else grid.double().numpy()


def dense(kind: Kind, weight: QuantizedWeight) -> torch.Tensor:
    """[E, N, K] of untransposed codes, in float64."""
    scheme = FORMATS[kind.format]
    numbers = numbers_of(scheme.codes, weight.codes.view(torch.uint8).numpy())
    _, n, k = numbers.shape

    def each(grid: torch.Tensor) -> np.ndarray:
        values = grid_numbers(kind, grid)
        return values.repeat(min(kind.group[0], n), axis=1)[:, :n].repeat(min(kind.group[1], k), axis=2)[:, :, :k]

    numbers = (numbers - (scheme.zero if weight.zeros is None else each(weight.zeros))) * each(weight.scales)
    return torch.from_numpy(numbers if weight.global_scales is None else numbers * weight.global_scales.double().numpy()[:, None, None])


def random_grid(kind: Kind, low: float, high: float, *shape: int) -> torch.Tensor:
    if kind.scales is ScaleType.e8m0:
        return torch.randint(125, 130, shape, dtype=torch.uint8)
    if kind.scales is ScaleType.e4m3:
        return torch.randint(0x30, 0x40, shape, dtype=torch.uint8)      # 0.5 .. 1.875
    return (low + (high - low) * torch.rand(shape)).to(kind.scales)


def random_weight(kind: Kind, num_experts: int, n: int, k: int) -> QuantizedWeight:
    """Any codes but those that are no numbers. Between two experts lie three rows of other codes."""
    codes = FORMATS[kind.format].codes
    data = torch.randint(0, 256, (num_experts, n + 3, k * codes.bits // 8), dtype=torch.uint8)
    if codes is Codes.e4m3:
        data[(data & 0x7F) == 0x7F] = 0x40
    if codes is Codes.e5m2:
        data[(data & 0x7C) > 0x50] ^= 0x40      # of 2^5 and less: no number is all of a sum
    data = data.view(torch.int8) if codes is Codes.int8 else data
    shape = (num_experts, -(-n // kind.group[0]), -(-k // kind.group[1]))
    low, high = {Codes.int4: (-8, 8), Codes.uint4: (0, 16)}.get(codes, (-100, 100))
    zeros = random_grid(kind, low, high, *shape).round() if kind.zeros else None
    global_scales = torch.rand(num_experts) + 0.5 if kind.global_scales else None
    return QuantizedWeight(data[:, :n], random_grid(kind, 0.5, 1.5, *shape), zeros, global_scales, kind.format, kind.group)


@dataclass
class QuantisedCase(Case):
    """w is the QuantizedWeight, numbers what it stands for."""
    numbers: torch.Tensor | None = None

    def reference(self) -> torch.Tensor:
        return Case(self.a, self.numbers, self.counts, self.bias, self.gather_indices).reference()


def make(kind: Kind, counts=COUNTS, n=102, k=150, dtype=BF16, layout="enk", gap=3, bias=F32, gathered=True) -> QuantisedCase:
    weight = random_weight(kind, len(counts), *((n, k) if layout == "enk" else (k, n)))
    numbers = dense(kind, weight)
    rows = sum(counts)
    return QuantisedCase(padded(23 if gathered else rows, k, dtype=dtype, gap=gap), weight if layout == "enk" else weight.mT, list(counts),
                         bias=None if bias is None else padded(len(counts), n, dtype=bias, gap=gap), gap=gap,
                         gather_indices=torch.randint(0, 23, (rows,), dtype=torch.int32) if gathered else None,
                         numbers=numbers if layout == "enk" else numbers.mT)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_at_once(kind, layout, dtype):
    make(kind, dtype=dtype, layout=layout).check(cpu(ISA))


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_instruction_sets(isa, layout, kind):
    make(kind, n=70, k=134, layout=layout).check(cpu(isa, tile_width=64))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_that_are_read_in_place(kind):
    """1 to 7 rows are several instances of a kernel, of which the last one packs."""
    make(kind, [1, 2, 3, 4, 5, 6, 7], n=35, k=600, dtype=F32).check(cpu(ISA, dot_rows=3, unpacked_rows=6))


@pytest.mark.few(2)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["int4", "uint4", "mxfp4", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_each_code_is_its_number(format, layout, in_place):
    """Unit vectors pick out single weights: each is exactly its float32, also the smallest ones."""
    kind = Kind(format, (1, 32), ScaleType.e8m0 if format == "mxfp4" else F32)
    codes, k = FORMATS[format].codes, 64
    every = torch.arange(256, dtype=torch.uint8)
    number = torch.from_numpy(numbers_of(codes, every[:, None].numpy()))
    data = every[number.isfinite().all(1)].repeat(9)[:k * 33 * codes.bits // 8].reshape(1, 33, -1)
    if layout == "ekn":
        data = data[:, :32]
    scales = random_grid(kind, 0.5, 1.5, 1, data.shape[1], k // 32)
    weight = QuantizedWeight(data.view(torch.int8) if codes is Codes.int8 else data, scales, format=format, group=kind.group)
    numbers = dense(kind, weight).float()
    w, numbers = (weight, numbers) if layout == "enk" else (weight.mT, numbers.mT)
    rows = w.shape[2]
    for first in range(0, rows, 3 if in_place else rows):
        a = torch.eye(rows)[first:first + (3 if in_place else rows)].contiguous()
        out = QuantisedCase(a, w, [a.shape[0]]).run(cpu(ISA))
        assert torch.equal(out, a @ numbers[0].T)


@pytest.mark.few(2)
@pytest.mark.parametrize("codes", [Codes.int4, Codes.e2m1, Codes.int8, Codes.e4m3])
@pytest.mark.parametrize("isa, product", [("avx512", b"vpmaddwd"), ("avx512_bf16", b"vpdpwssd")])
def test_wide_instruction_sets_compile(isa, product, codes):
    """Also where this CPU cannot run them."""
    problem = GroupedGemmProblem(100, 160, Dtype.bf16, Dtype.bf16, quantization=Quantization(codes, ScaleType.f32, 1, 32))
    image = spirv.compile_to_spirv(generate(problem, cpu_config(problem, isa)), [f"-I{sources_dir()}/include", f"-I{sources_dir()}"])
    assert (product in image) == (codes is not Codes.e4m3)


@pytest.mark.few(2)
@pytest.mark.skipif("avx512_bf16" not in USABLE_ISAS, reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("format, group", [("fp8_e4m3", 256), ("fp8_e5m2", 16), ("mxfp8", 32), ("int8", 32)])
def test_bytes_as_pairs_of_bf16(format, group):
    """All 256 codes, those that are no numbers, too, by whole runs and a rest."""
    codes, k = FORMATS[format].codes, 88
    kind = Kind(format, (1, group), F32 if codes is Codes.int8 else ScaleType.e8m0)
    data = torch.arange(256, dtype=torch.uint8).repeat(11).reshape(1, 32, k)
    scales = random_grid(kind, 1, 1, 1, 32, -(-k // group))
    weight = QuantizedWeight(data.view(torch.int8) if codes is Codes.int8 else data, scales, format=format, group=kind.group)
    numbers = dense(kind, weight)[0]
    for column in (0, 15, 16, 33, 63, 64, 87):
        a = torch.zeros(1, k, dtype=BF16)
        a[0, column] = 1
        out = QuantisedCase(a, weight, [1]).run(cpu("avx512_bf16"))
        expected = torch.where(numbers.isfinite().all(1), numbers[:, column], torch.nan)
        torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.few(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format, what", [("fp8_e4m3", "codes"), ("fp8_e5m2", "codes"), ("mxfp4", "scales"), ("mxfp8", "scales"),
                                          ("nvfp4", "scales"), ("int8", "scales")])
def test_what_is_no_number_stays_none(format, what, layout):
    """NaN of a code or a scale comes to its own sums, and to no other."""
    kind = next(kind for kind in KINDS if kind.format == format)
    case = make(kind, [2, 9], n=40, k=96, layout=layout, gathered=False)
    weight = case.w if layout == "enk" else case.w.mT
    grid = getattr(weight, what)
    nan = float("nan") if grid.dtype.is_floating_point else 255 if kind.scales is ScaleType.e8m0 and what == "scales" else 0xFF
    grid[1, grid.shape[1] // 2, grid.shape[2] // 2] = nan
    numbers = dense(kind, weight)
    case.numbers = numbers if layout == "enk" else numbers.mT
    out, reference = case.run(cpu(ISA)), case.reference()
    assert reference.isnan().any() and not reference.isnan().all()
    assert torch.equal(out.isnan(), reference.isnan())


WHOLE_NUMBERS = [KINDS[index] for index in (0, 2, 3, 6, 7)]     # of a few rows codes are multiplied as integers


def few_rows(kind: Kind, a: torch.Tensor, out_dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    """Products with random weights, by the kernel, and the weights [N, K] in float64."""
    weight = random_weight(kind, 1, 37, a.shape[1])
    out = QuantisedCase(a, weight, [a.shape[0]], out_dtype=out_dtype).run(cpu(ISA, dot_rows=2))
    return out.double(), dense(kind, weight)[0]


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", WHOLE_NUMBERS, ids=str)
@pytest.mark.parametrize("dtype, out_dtype", [(BF16, F32), (F16, F32), (F32, F32), (F16, F16), (BF16, F16)], ids=str)
def test_a_few_rows_are_as_exact_as_they_say(dtype, out_dtype, kind):
    """Numbers of all sizes, of which eight neighbours (of 8-bit codes four) have one unit: the largest has 15 bits, of float32 29."""
    k, lane, bits = 232, 8 if FORMATS[kind.format].codes.bits == 4 else 4, 28 if out_dtype == F32 else 14
    a = (torch.randn(3, k) * 2.0**torch.randint(-12, 3, (3, k))).to(dtype)
    a[1, 40:80] = 0
    out, w = few_rows(kind, a, out_dtype)
    largest = a.abs().double().reshape(3, -1, lane).amax(2).repeat_interleave(lane, 1)
    rounded = torch.where(largest > 0, 2.0**(largest.log2().floor() - bits) / 2, 0.0)
    errors = 6 * (rounded.square() @ w.square().T / 3).sqrt() + 2.0**-21 * (a.double().abs() @ w.abs().T)
    if kind.zeros:      # are subtracted from sums of codes
        errors *= 4
    reference = a.double() @ w.T
    assert ((out - reference).abs() <= errors + (out_dtype == F16) * 2.0**-11 * (reference.abs() + errors)).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", [kind for kind in WHOLE_NUMBERS if not kind.zeros], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_of_a_few_rows(dtype, kind):
    a = torch.randn(4, 100).to(dtype)
    a[0, 3], a[1, 64], a[2, 99] = torch.inf, -torch.inf, torch.nan
    out, w = few_rows(kind, a)
    reference = a.double() @ w.T
    assert torch.equal(out.isnan(), reference.isnan()) and torch.equal(out == torch.inf, reference == torch.inf)
    assert torch.equal(out == -torch.inf, reference == -torch.inf) and out[3].isfinite().all()


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", WHOLE_NUMBERS[:1], ids=str)
@pytest.mark.parametrize("size", [2.0**-120, 2.0**110])
def test_smallest_and_largest_rows(size, kind):
    a = torch.randn(2, 96) * size
    out, w = few_rows(kind, a)
    torch.testing.assert_close(out, a.double() @ w.T, rtol=1e-4, atol=size * 1e-5)


SILU = Activation()
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=7.0)


@pytest.mark.few(1)
@pytest.mark.parametrize("activation", [OAI, SILU], ids=["interleaved", "halves"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
def test_fused(kind, layout, activation):
    """Pairs, whose up values begin at an odd column, bias, and rows that are scaled and scattered."""
    case = make(kind, n=78, k=90, layout=layout)
    rows, pairs = sum(case.counts), torch.randperm(sum(case.counts) + 5, dtype=torch.int32)[:sum(case.counts)]
    scales = torch.rand(rows)
    out = torch.full((rows + 5, 39), POISON, dtype=BF16)
    call = launch.Call(case.a, case.w, torch.tensor(case.counts, dtype=torch.int32), rows, bias=case.bias, row_indices=pairs,
                       gathered=True, scattered=True, slots=4, row_scales=scales, row_scale=RowScale.outputs, activation=activation)
    with force_config(cpu(ISA, tile_width=24)), Submission(queue_for(out.device), out.device) as submission:
        launch.launch(submission, call, out)
    case.gather_indices = pairs // 4
    expected = torch.full(out.shape, POISON, dtype=torch.float64)
    expected[pairs.long()] = apply_activation(case.reference(), activation) * scales[:, None].double()
    each, _ = LIMITS[BF16]
    rms = expected[pairs.long()].square().mean().sqrt()
    assert ((out.double() - expected).abs() <= each * torch.maximum(expected.abs(), rms)).all()


@settings(settings.get_profile("compiling"))
@given(kind=st.sampled_from(KINDS), n=st.integers(1, 100), k=st.integers(1, 150),
       counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
       group=st.tuples(st.integers(1, 40), st.integers(1, 200)), layout=st.sampled_from(LAYOUTS))
def test_any_shape_and_group(kind, n, k, counts, group, layout):
    """Rows of memory have an even number of 4-bit codes."""
    if FORMATS[kind.format].group is None:
        kind = replace(kind, group=group)
    make(kind, counts, 2 * n, 2 * k, F32, layout).check(cpu(ISA))


@pytest.mark.full
@pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
def test_results_do_not_depend_on_who_computes_them(kind, monkeypatch):
    case = make(kind, k=300)
    expected = case.run(cpu())
    for groups in (1, 7):
        target = replace(launch.target_of(launch.facts_of(launch.queue_for(torch.device("cpu")))), cores=groups)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "target_of", lambda facts: target)
            known_calls().clear()      # of another number of cores
            assert torch.equal(case.run(cpu()), expected)


GUARDED = '''
from dataclasses import replace
import sys
from tests.kernels.before_a_hole import before_a_hole
from tests.kernels.test_quantised_cpu_device import KINDS, cpu, make

for kind in KINDS:
    if str(kind) not in sys.argv[3:]:
        continue
    case = make(kind, layout=sys.argv[1])
    case.a, case.bias, case.gather_indices = map(before_a_hole, (case.a, case.bias, case.gather_indices))
    parts = {name: getattr(case.w, name) for name in ("codes", "scales", "zeros", "global_scales")}
    case.w = replace(case.w, **{name: before_a_hole(part) for name, part in parts.items() if part is not None})
    case.check(cpu(sys.argv[2]))
print("within bounds")
'''


@pytest.mark.few(1)
@pytest.mark.parametrize("kinds", [MAIN_KINDS[::3], MAIN_KINDS[1:3]], ids=lambda kinds: " ".join(map(str, kinds)))
@pytest.mark.parametrize("layout", LAYOUTS[::-1])
@pytest.mark.parametrize("isa", USABLE_ISAS[1:])
def test_reads_end_with_codes_and_scales(layout, isa, kinds):
    done = subprocess.run([sys.executable, "-c", GUARDED, layout, isa, *map(str, kinds)], text=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "within bounds", (done.returncode, done.stderr[-2000:])
