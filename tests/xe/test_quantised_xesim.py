"""Quantised weights in [E, N, K]: the BMG machine code, executed by xesim, against weights dequantised by definition and rounded once."""
from __future__ import annotations

import numpy as np
import pytest

from moe_xe.isa import kernels
from moe_xe.isa.listing import summarize
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, GroupedGemmProblem, RowScale
from moe_xe.plan.xe.rules import check_xe_config

from .case import Case, default_config, missing, run
from .quantised import code_values

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BF16, F16, F32 = Dtype.bf16, Dtype.f16, Dtype.f32
COUNTS = [70, 0, 1, 15]      # of the first height whole and in part, and of the second
N, K = 204, 328              # tails of tiles, of rounds of 128 and of groups
OAI = Activation(ActivationKind.swiglu_oai, interleaved=True, alpha=1.702, limit=0.7)
KINDS = {
    "rows, bias": dict(output=F32, bias=BF16),
    "gathered": dict(output=F32, gathered=True, slots=3),
    "gathered, halves": dict(output=F32, gathered=True, activation=Activation(), slots=2),
    "gathered, interleaved, bias": dict(output=F32, gathered=True, activation=OAI, slots=4, bias=F32),
    "scattered": dict(output=F32, scattered=True, row_scale=RowScale.outputs),
}


def problem_of(quantization: Quantization, input: Dtype, kind: str, n: int = N, k: int = K) -> GroupedGemmProblem:
    return GroupedGemmProblem(n, k, input, quantization=quantization, **KINDS[kind])


def config_of(height: int = 64, rows=(64, 16), columns=(32, 64)) -> XeConfig:
    return XeConfig((height, 16), 128, 2, 7, Schedule.dynamic, rows, columns, prefetch_distance=3)


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


# f16 multiplies twice where it cannot hold a scale: 2^-22 of a weight may go into each product
@pytest.mark.few(7)
@pytest.mark.parametrize("input", [BF16, F16])
@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, input):
    run(problem_of(FORMATS[format], input, "gathered"), config_of(), COUNTS, groups=(1, 7))


@pytest.mark.parametrize("format, input, kind, n", [
    ("mxfp4", BF16, "gathered, interleaved, bias", 208),
    pytest.param("mxfp4", BF16, "rows, bias", N, marks=pytest.mark.full),
    pytest.param("nvfp4", F16, "scattered", N, marks=pytest.mark.full),
    ("int4, zeros", F16, "gathered, halves", 208),
    pytest.param("int4", BF16, "gathered, halves", 208, marks=pytest.mark.full),
    ("fp8 in blocks", BF16, "scattered", N),
    pytest.param("uint4, zeros", BF16, "rows, bias", N, marks=pytest.mark.full)])
def test_fusions(format, input, kind, n):
    run(problem_of(FORMATS[format], input, kind, n), config_of(), COUNTS, groups=(7, 40))
