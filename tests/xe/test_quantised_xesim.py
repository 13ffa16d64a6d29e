"""Quantised weights: the BMG machine code, executed by xesim, against weights dequantised by definition and rounded once."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_xe.isa import kernels
from moe_xe.isa.listing import summarize
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem
from moe_xe.plan.model.devices import record_named
from moe_xe.plan.xe.candidates import choose_xe_config

from .case import EKN, ENK, Case, decode, encode, missing, run
from .quantised import COUNTS, KINDS, OAI

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
N, K = 204, 328              # tails of tiles, of rounds of 128 and of groups
SHAPES = {ENK: ((64, 16), (32, 64)), EKN: ((32, 8), (64, 64))}      # rows and columns of sub-groups


def problem_of(quantization: Quantization, input: Dtype, kind: str, layout=ENK, n: int = N, k: int = K) -> GroupedGemmProblem:
    """fp32 sums. f16 has float32 scales as two numbers, and rounds a few of their products otherwise."""
    exact = input is BF16 or quantization.scales is not ScaleType.f32
    return GroupedGemmProblem(n if exact and layout is ENK else 200, k, input, F32 if exact else F16, layout, quantization=quantization,
                              **KINDS[kind])


def config_of(layout=ENK) -> XeConfig:
    rows, columns = SHAPES[layout]
    return XeConfig((64, 16), 128, 2, 7, Schedule.dynamic, rows, columns, prefetch_distance=3)


def codes(codes: Codes, scales: ScaleType, rows: int, columns: int, **more) -> Quantization:
    return Quantization(codes, scales, rows, columns, zero=8.0 if codes is Codes.uint4 and not more.get("zeros") else 0.0, **more)


# All codes, all types of scales, groups of a row and of blocks, shorter and longer than a round of 128.
FORMATS = {
    "int4": codes(Codes.int4, ScaleType.f16, 1, 128),
    "int4, zeros": codes(Codes.int4, ScaleType.bf16, 1, 32, zeros=True),
    "uint4": codes(Codes.uint4, ScaleType.f16, 1, 64),
    "uint4, zeros": codes(Codes.uint4, ScaleType.f16, 1, 128, zeros=True),
    "mxfp4": codes(Codes.e2m1, ScaleType.e8m0, 1, 32),
    "nvfp4": codes(Codes.e2m1, ScaleType.e4m3, 1, 16, global_scales=True),
    "int8": codes(Codes.int8, ScaleType.f32, 1, K),
    "int8, zeros": codes(Codes.int8, ScaleType.f16, 4, 256, zeros=True),
    "fp8 in blocks": codes(Codes.e4m3, ScaleType.f32, 128, 128),
    "fp8, global": codes(Codes.e4m3, ScaleType.bf16, N, K, global_scales=True),
    "mxfp8": codes(Codes.e4m3, ScaleType.e8m0, 1, 32),
    "fp8 e5m2": codes(Codes.e5m2, ScaleType.bf16, 1, 128),
}


SAMPLE = [("mxfp4", BF16, EKN), ("nvfp4", F16, ENK), ("int8", F16, ENK)]      # those below have the other codes
ALL = [(format, input, layout) for format in FORMATS for input in (BF16, F16) for layout in (ENK, EKN)]


@pytest.mark.parametrize("format, input, layout", [
    pytest.param(*case, marks=[pytest.mark.full] * (case not in SAMPLE)) for case in ALL])
def test_formats(format, input, layout):
    problem = problem_of(FORMATS[format], input, "gathered", layout)
    run(problem, config_of(layout), COUNTS, groups=(1, 7))


@pytest.mark.parametrize("format, input, kind, layout, n", [
    ("mxfp4", BF16, "gathered, interleaved, bias", ENK, 208),
    pytest.param("mxfp4", BF16, "rows, bias", ENK, N, marks=pytest.mark.full),
    pytest.param("nvfp4", F16, "scattered", ENK, N, marks=pytest.mark.full),
    ("uint4, zeros", F16, "gathered, halves", ENK, 208),
    pytest.param("int4", BF16, "gathered, halves", ENK, 208, marks=pytest.mark.full),
    pytest.param("fp8 in blocks", BF16, "scattered", ENK, N, marks=pytest.mark.full),
    ("fp8 in blocks", BF16, "scattered", EKN, N),
    pytest.param("int4, zeros", F16, "rows, bias", EKN, N, marks=pytest.mark.full)])
def test_fusions(format, input, kind, layout, n):
    run(problem_of(FORMATS[format], input, kind, layout, n), config_of(layout), COUNTS, groups=(7, 40))


@pytest.mark.parametrize("format, k, layout", [
    ("int4", 128, ENK), *(pytest.param(*case, marks=pytest.mark.full) for case in [
        ("mxfp4", 136, ENK), ("int8, zeros", 72, ENK), ("fp8 in blocks", 64, ENK), ("fp8 in blocks", 24, EKN), ("uint4", 256, EKN),
        ("nvfp4", 2056, ENK)])])
def test_short_and_long_k(format, k, layout):
    """No round of 128, one, or one and a tail."""
    run(problem_of(FORMATS[format], BF16, "gathered", layout, k=k), config_of(layout), [33, 2], groups=(2,))


@pytest.mark.parametrize("input, least, largest", [(BF16, 60, 160), pytest.param(F16, 110, 134, marks=pytest.mark.full)])
def test_every_e8m0(input, least, largest):
    """Sums of each column in their own size; 255 is NaN, and nothing else is."""
    problem = problem_of(codes(Codes.e2m1, ScaleType.e8m0, 1, 256), input, "rows, bias", k=256)
    case = Case(replace(problem, bias=None), [20])
    exponents = np.resize(np.arange(least, largest + 1, dtype="u1"), N)
    want = case.want * 2.0 ** (exponents.astype("f8") - case.quantised.scales[0, :, 0])
    case.quantised.scales[0, :, 0] = exponents
    case.quantised.scales[0, 9] = 255
    case.launch(config_of(), 1)
    got = case.d.view("f4")[:, :N]
    assert np.isnan(got[:, 9]).all()
    got[:, 9] = want[:, 9]
    assert (np.abs(got - want).max(0) < 1e-5 * np.abs(want).max(0)).all()
    case.a[:], case.w[0, 9] = encode(np.ones(1, "f4"), input), 0x22       # 1 x 1 x NaN, which an infinity would not be
    case.launch(config_of(), 1)
    assert np.isnan(got[:, 9]).all()


@pytest.mark.few(1)
@pytest.mark.parametrize("format, byte", [("fp8 in blocks", 0x7F), ("fp8 e5m2", 0xFD)])
@pytest.mark.parametrize("input", [BF16, F16])
@pytest.mark.parametrize("layout", [ENK, EKN])
def test_codes_that_are_no_numbers(layout, input, format, byte):
    """Their outputs are NaN, whichever byte of a register they are, and all others as if they were not there: beside the greatest numbers, too."""
    case = Case(problem_of(replace(FORMATS[format], finite=False), input, "rows, bias", layout), [20, 3])
    codes = case.w if layout is ENK else case.w.transpose(0, 2, 1)      # [expert, N, K]
    columns = range(0, case.problem.n, 37)
    codes[:, ::3, ::2] = 0x7E if byte == 0x7F else 0xFB
    case.launch(config_of(layout), 3)
    before = decode(case.d, case.problem.output)[:, :case.problem.n].copy()
    for i, n in enumerate(columns):
        codes[0, n, i * 31 % case.problem.k] = byte ^ (i % 2 << 7)
    case.launch(config_of(layout), 3)
    after = decode(case.d, case.problem.output)[:, :case.problem.n]
    assert np.isfinite(before).all()
    before[:20, columns] = np.nan
    assert np.array_equal(after, before, equal_nan=True)


# A block of gpt-oss, and of Qwen3-30B as int4 and as FP8.
MODELS = {
    "gpt-oss": (codes(Codes.e2m1, ScaleType.e8m0, 1, 32), dict(gathered=True, slots=4, activation=OAI, bias=BF16), 5760, 2880, 32),
    "gpt-oss, down": (codes(Codes.e2m1, ScaleType.e8m0, 1, 32), dict(scattered=True, output=F32, bias=BF16), 2880, 2880, 32),
    "qwen3, int4": (codes(Codes.int4, ScaleType.f16, 1, 128), dict(gathered=True, slots=8, activation=Activation()), 1536, 2048, 128),
    "qwen3, int4, zeros": (codes(Codes.uint4, ScaleType.f16, 1, 128, zeros=True), dict(scattered=True, output=F32), 2048, 768, 128),
    "qwen3, fp8": (codes(Codes.e4m3, ScaleType.f32, 128, 128), dict(gathered=True, slots=8, activation=Activation()), 1536, 2048, 128),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("device", ["bmg", "pvc", "lnl-m", "ptl-h"])
@pytest.mark.parametrize("rows", [64, 1 << 15])
@pytest.mark.parametrize("input", [BF16, F16])
@pytest.mark.parametrize("model", MODELS)
def test_defaults_do_not_spill(model, input, rows, device):
    quantization, fusions, n, k, experts = MODELS[model]
    problem = GroupedGemmProblem(n, k, input, **{"output": input, **fusions}, quantization=quantization)
    config = choose_xe_config(problem, rows, experts, record_named(RECORDS[device]))
    assert summarize(kernels.build(problem, config, device), "grouped_gemm").spill_bytes == 0


RECORDS = {"bmg": "b580", "pvc": "max1100", "lnl-m": "lunar-lake", "ptl-h": "panther"}

# Other instructions for each dpas where an operand serves 64 tokens, and instructions for each byte of codes at 16 tokens: on bmg as many
# as its matrix engines hide (docs/choosing.md). f16 has float32 scales twice.
BOUNDS = {("int4", BF16): (5.3, 0.36), ("uint4, zeros", BF16): (5.3, 0.36), ("uint4, zeros", F16): (5.3, 0.36), ("mxfp4", BF16): (5.9, 0.36),
          ("mxfp4", F16): (5.9, 0.36), ("fp8 in blocks", BF16): (4.6, 0.14), ("int8", BF16): (4.0, 0.14), ("int8, zeros", BF16): (4.0, 0.14)}


@pytest.mark.few(2)
@pytest.mark.parametrize("format, input", BOUNDS)
def test_instructions_of_the_k_loop(format, input):
    quantization = FORMATS[format]
    if quantization.columns == K:
        quantization = replace(quantization, columns=2880)
    problem = GroupedGemmProblem(512, 2880, input, input, quantization=quantization, gathered=True)
    per_dpas, per_byte = BOUNDS[format, input]

    def loop(height: int, width: int, rows: int, columns: int):
        config = XeConfig((height,), width, 8, 7, Schedule.dynamic, (rows,), (columns,), 3)
        return kernels.prefill_loop(summarize(kernels.build(problem, config, "bmg"), "grouped_gemm").loops)

    prefill, decode = loop(256, 256, 64, 32), loop(16, 512, 16, 64)
    assert prefill.other_per_dpas <= per_dpas
    assert decode.instructions <= per_byte * 64 * 128 * FORMATS[format].codes.bits / 8     # 64 columns, a round of 128 along K
