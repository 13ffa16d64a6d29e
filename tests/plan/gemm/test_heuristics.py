import dataclasses

import pytest

from moe_xe.plan.gemm import heuristics as h
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm.config import Schedule, XeConfig
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, Operands, WeightLayout

PROBLEM = GroupedGemmProblem(n=256, k=128, input=Dtype.bf16, output=Dtype.bf16)
ALIGNED = Operands(a=0x1000, w=0x2000, d=0x3000, total_rows=100, a_rows=100, num_experts=4, a_stride=128, w_stride=128,
                   w_expert_stride=256 * 128, d_stride=256, d_rows=100)

XE = XeConfig((256, 128, 64, 32, 16), 256, 8, 7, Schedule.dynamic, (32, 32, 16, 16, 16), (64, 32, 32, 16, 8), prefetch_distance=3)


def family(problem=PROBLEM, is_cpu=False, has_dpas=True, **changes):
    return h.choose_family(problem, dataclasses.replace(ALIGNED, **changes), is_cpu, has_dpas)


def test_the_device_decides():
    assert family() is h.Family.xe
    assert family(is_cpu=True) is h.Family.cpu
    assert family(has_dpas=False) is h.Family.generic


UNFIT = [{"a": 0x1020}, {"w": 0x2010},                                        # bases of 64 bytes
         {"a_stride": 132}, {"w_stride": 129, "w_expert_stride": 129 * 256},  # pitches of 16 bytes
         {"w_expert_stride": 256 * 128 + 8},                                  # every expert's base
         {"a_rows": 1 << 24}, {"a_stride": 1 << 23}, {"a_stride": 0}, {"w_stride": 0}]
UNFIT_D = [({"d": 0x3008}, "enk"), ({"d_stride": 260}, "enk"), ({"d": 0x3010}, "ekn"), ({"d_stride": 260}, "ekn"),
           ({"total_rows": 1 << 24}, "ekn"), ({"d_stride": 1 << 23}, "enk"), ({"d_stride": 1 << 23}, "ekn")]


@pytest.mark.parametrize("change, layout", [(change, "enk") for change in UNFIT] + UNFIT_D)
def test_what_block_messages_cannot_take_goes_elsewhere(change, layout):
    problem = dataclasses.replace(PROBLEM, weights=WeightLayout(layout))
    aligned = {} if layout == "enk" else {"w_stride": 256}
    assert family(problem, **aligned) is h.Family.xe
    assert family(problem, **(aligned | change)) is h.Family.generic


@pytest.mark.parametrize("change", [{"d": 0x3010}, {"d_stride": 260}, {"d_rows": 1 << 24}])
def test_rows_are_scattered_by_block_messages(change):
    problem = dataclasses.replace(PROBLEM, weights=WeightLayout.ekn, scattered=True)
    aligned = {"w_stride": 256, "total_rows": 1 << 24}
    assert family(problem, **aligned) is h.Family.xe
    assert family(problem, **aligned, **change) is h.Family.generic


def test_swapped_stores_take_any_n():
    assert family(dataclasses.replace(PROBLEM, n=203), d_stride=208, w_expert_stride=203 * 128) is h.Family.xe


@pytest.mark.parametrize("k", [24, 100])
def test_narrow_rows_and_ragged_ends_go_elsewhere(k):
    assert family(dataclasses.replace(PROBLEM, k=k)) is h.Family.generic


def test_one_experts_stride_does_not_matter():
    assert family(num_experts=1, w_expert_stride=7) is h.Family.xe


def test_float32_is_exact_unless_tf32_is_allowed():
    exact = dataclasses.replace(PROBLEM, input=Dtype.f32, output=Dtype.f32)
    assert family(exact) is h.Family.generic
    assert family(dataclasses.replace(exact, tf32=True)) is h.Family.xe


CODES = dataclasses.replace(PROBLEM, quantization=Quantization(Codes.int4, ScaleType.f16, 1, 32))


def quantised(problem=CODES, **changes):
    return dataclasses.replace(problem, quantization=dataclasses.replace(problem.quantization, **changes))


@pytest.mark.parametrize("problem, operands, fits", [
    (CODES, {}, True), (CODES, {"scales": 0x1004, "zeros": 0x2004}, True), (CODES, {"scales": 0x1002}, False),
    (CODES, {"zeros": 0x2001}, False), (CODES, {"w_stride": 160, "w_expert_stride": 160 * 256}, True),
    (CODES, {"w_stride": 144, "w_expert_stride": 144 * 256}, False),      # 72 bytes
    (CODES, {"w_expert_stride": 256 * 128 + 64}, False), (CODES, {"w": 0x2020}, False),
    (dataclasses.replace(CODES, k=120), {}, False),                       # 60 bytes are no surface
    (quantised(codes=Codes.int8), {"w_stride": 144, "w_expert_stride": 144 * 256}, True),
    (quantised(columns=16), {}, True), (quantised(columns=24), {}, False), (quantised(columns=48), {}, False),
    (quantised(columns=384), {}, True), (quantised(columns=1000), {}, True),        # one group
    (quantised(zeros=True), {}, True), (quantised(codes=Codes.e4m3, zeros=True), {}, False),
    (quantised(codes=Codes.e2m1, zero=1.0), {}, False),
    (dataclasses.replace(CODES, weights=WeightLayout.ekn), {"w_stride": 256}, True),
    (dataclasses.replace(CODES, weights=WeightLayout.ekn, activation=Activation()), {"w_stride": 256, "d_stride": 128}, False),
    (dataclasses.replace(CODES, input=Dtype.f32, output=Dtype.f32, tf32=True), {}, False)])
def test_codes_and_scales_that_fit(problem, operands, fits):
    assert family(problem, **operands) is (h.Family.xe if fits else h.Family.generic)


@pytest.mark.parametrize("change, message", [
    ({"heights": (16, 32)}, "strictly falling"), ({"heights": ()}, "strictly falling"), ({"min_fill_eighths": 9}, "at most 8"),
    ({"prefetch_distance": 16}, "prefetch_distance must be from 0 to 15, got 16"), ({"raster_group": 0}, "raster_group must be at least 1"), ({"sub_group_rows": (32,)}, "one entry for each"),
    ({"sub_group_columns": (64, 16, 32, 16, 8)}, "no more than the first")])
def test_a_wrong_configuration_names_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(XE, **change)


def test_dpas_of_the_generation_before_is_too_narrow():
    assert h.has_wide_dpas(True, [16, 32])
    assert not h.has_wide_dpas(True, [8, 16, 32]) and not h.has_wide_dpas(False, [16, 32])


def test_intel_cpus_multiply_bf16_with_fma():
    assert h.fast_isa("avx512_bf16", "Intel(R) Xeon(R) Processor") == "avx512"
    assert h.fast_isa("avx512_bf16", "AMD EPYC 9654 96-Core Processor") == "avx512_bf16"
    assert h.fast_isa("avx2", "Intel(R) Xeon(R) Processor") == "avx2"


@pytest.mark.parametrize("best, of_f16", [("amx", "avx512"), ("amx_fp16", "amx_fp16")])
def test_what_amx_multiplies(best, of_f16):
    def config(dtype: Dtype, **fields):
        return h.cpu_config(GroupedGemmProblem(512, 512, dtype, dtype, **fields), best)

    assert h.fast_isa(best, "Intel(R) Xeon(R) Processor") == best
    assert config(Dtype.bf16).isa == config(Dtype.i8).isa == "amx" and config(Dtype.f32).isa == "avx512" and config(Dtype.f16).isa == of_f16
    assert config(Dtype.f16, quantization=Quantization(Codes.int4, ScaleType.f16, 1, 32)).isa == "avx512"
    assert config(Dtype.bf16).k_block > config(Dtype.bf16, weights=WeightLayout.ekn).k_block


@pytest.mark.parametrize("codes, isa, most, ahead", [(None, "avx512", 4, 8192), (Codes.e2m1, "avx512_bf16", 8, 8192),
                                                     (Codes.int8, "avx512_bf16", 4, 8192), (Codes.e4m3, "avx512_bf16", 4, 8192)])
def test_few_rows_on_cores_with_amx(codes, isa, most, ahead):
    """Their FMA is as fast as their pairs of bf16, which FP8 becomes sooner; other codes are integers."""
    problem = dataclasses.replace(PROBLEM, n=1536, k=2048, quantization=codes and Quantization(codes, ScaleType.f32, 1, 32))
    few, more = (h.choose_config(problem, h.Family.cpu, rows, 64, cores=16, isa="amx", most_rows=rows) for rows in (most, most + 1))
    assert (few.isa, few.heights, few.unpacked_rows, few.prefetch_bytes) == (isa, (most,), most, ahead)
    assert more.isa == "amx" and more.unpacked_rows == most


@pytest.mark.parametrize("dtype", [Dtype.f16, Dtype.f32])
@pytest.mark.parametrize("codes, isa", [(None, "avx512"), (Codes.e2m1, "avx512_bf16")])
def test_few_rows_that_are_not_bf16_on_cores_with_amx(codes, isa, dtype):
    problem = dataclasses.replace(PROBLEM, n=1536, k=2048, input=dtype, quantization=codes and Quantization(codes, ScaleType.f32, 1, 32))
    few = h.choose_config(problem, h.Family.cpu, 4, 64, cores=16, isa="amx", most_rows=4)
    assert (few.isa, few.prefetch_bytes) == (isa, 8192)


@pytest.mark.parametrize("rows, isa", [(4, "avx512"), (5, "amx_fp16")])
def test_few_rows_of_fp16_on_cores_that_multiply_it_by_tiles(rows, isa):
    problem = dataclasses.replace(PROBLEM, n=1536, k=2048, input=Dtype.f16)
    assert h.choose_config(problem, h.Family.cpu, rows, 64, cores=16, isa="amx_fp16", most_rows=rows).isa == isa


@pytest.mark.parametrize("weights, codes, most", [(WeightLayout.enk, Codes.int4, 16), (WeightLayout.ekn, Codes.int4, 8), (WeightLayout.enk, Codes.int8, 8)])
def test_more_rows_of_four_bit_codes_are_read_in_place(weights, codes, most):
    problem = dataclasses.replace(PROBLEM, weights=weights, quantization=Quantization(codes, ScaleType.f16, 1, 128))
    assert h.cpu_config(problem, "avx2").unpacked_rows == h.cpu_config(problem, "avx512").unpacked_rows == most


def test_avx2_asks_for_dense_weights_late():
    dense, codes = (h.cpu_config(problem, "avx2") for problem in (PROBLEM, CODES))
    assert dense.prefetch_bytes == 256 and codes.prefetch_bytes == h.cpu_config(PROBLEM, "avx512").prefetch_bytes == 4096


@pytest.mark.parametrize("isa, rows, width", [("amx", 4096, 384), ("amx", 8, 192), ("amx", 3, 96), ("amx", 1, 64), ("avx2", 4096, 192), ("avx2", 1, 64)])
def test_tiles_are_as_wide_as_there_are_enough_of_them(isa, rows, width):
    problem = GroupedGemmProblem(5760, 2880, Dtype.bf16, Dtype.bf16)
    assert h.choose_config(problem, h.Family.cpu, rows, 32, cores=8, isa=isa).tile_width == width


@pytest.mark.parametrize("rows, most_rows, height", [(64, 8, 8), (64, 9, 168), (8, None, 8), (9, None, 168)])
def test_tiles_are_as_low_as_what_is_read_in_place(rows, most_rows, height):
    problem = GroupedGemmProblem(5760, 2880, Dtype.bf16, Dtype.bf16)
    assert h.choose_config(problem, h.Family.cpu, rows, 32, cores=8, isa="avx2", most_rows=most_rows).heights == (height,)


def test_wanted_vector_instructions():
    assert h.chosen_isa("avx512_bf16", "AMD EPYC", "") == "avx512_bf16" and h.chosen_isa("avx512_bf16", "Intel", "") == "avx512"
    assert h.chosen_isa("avx512_bf16", "Intel", "avx512_bf16") == "avx512_bf16" and h.chosen_isa("avx512", "AMD", "baseline") == "baseline"
    for wrong in ("avx512", "AVX2", "sse"):
        with pytest.raises(ValueError, match=f"MOE_XE_CPU_ISA must be one of avx2, baseline on this CPU, got '{wrong}'"):
            h.chosen_isa("avx2", "AMD", wrong)
