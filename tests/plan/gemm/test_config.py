"""What no configuration can be, whatever the problem, and how configurations read."""
import dataclasses
from dataclasses import replace

import pytest

from moe_xe.plan.choice.block_config import GemmConfigs, MoeConfig
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.gemm.config import MOST, CpuConfig, GenericConfig, Schedule, TileConfig, XeConfig
from moe_xe.plan.outer.config import OuterConfig, OuterCpuConfig, OuterGenericConfig, OuterXeConfig
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

TILES = dict(heights=(64, 32), tile_width=128, raster_group=8, min_fill_eighths=7, schedule=Schedule.dynamic)
PARTS = dict(sub_group_rows=(32, 32), sub_group_columns=(64, 32))
OUTER = dict(tile_rows=64, tile_columns=128, splits=2)
OUTER_PARTS = dict(sub_group_rows=32, sub_group_columns=64)
XE = XeConfig(**TILES, **PARTS, prefetch_distance=3)
GENERIC = GenericConfig(**TILES, **PARTS)
CPU = CpuConfig(**TILES, isa="avx2", micro_rows=6, micro_columns=16, k_block=256, unpacked_rows=6, dot_rows=2, prefetch_columns=16)
OUTER_XE = OuterXeConfig(**OUTER, **OUTER_PARTS, prefetch_distance=4)
OUTER_GENERIC = OuterGenericConfig(**OUTER, **OUTER_PARTS)
OUTER_CPU = OuterCpuConfig(**OUTER, isa="avx512", micro_rows=14, micro_columns=32, row_block=128)
AMX = dict(isa="amx", micro_rows=32, micro_columns=32)
CPU_AMX, OUTER_AMX = replace(CPU, **AMX), replace(OUTER_CPU, **AMX)
ALL = [XE, GENERIC, CPU, OUTER_XE, OUTER_GENERIC, OUTER_CPU]

FALLING, AT_LEAST_ONE = "heights must be positive and strictly falling", "must be at least 1"
WRONG = [
    *((config, dict(heights=heights), FALLING) for config in (XE, GENERIC, CPU) for heights in ((), (16, 32), (32, 32), (32, 0))),
    *((config, {name: 0}, f"{name} must be at least 1, got 0") for config in (XE, GENERIC, CPU)
      for name in ("tile_width", "raster_group", "splits")),
    *((config, dict(min_fill_eighths=value), "min_fill_eighths must be at least 1 and at most 8") for config in (XE, CPU) for value in (0, 9)),
    *((config, dict(tile_width=value), f"tile_width must be from 0 to {MOST}, got {value}") for config in (XE, GENERIC, CPU)
      for value in (-1, MOST + 1)),
    *((config, dict(heights=(MOST + 1, 32)), f"heights must be from 0 to {MOST}") for config in (XE, CPU)),
    *((config, {name: (32,)}, "one entry for each of the heights") for config in (XE, GENERIC) for name in PARTS),
    *((config, {name: (32, 0)}, f"{name} must be at least 1 each") for config in (XE, GENERIC) for name in PARTS),
    *((config, dict(sub_group_columns=(64, 4)), "no more than the first") for config in (XE, GENERIC)),
    *((config, dict(sub_group_rows=(64, 64)), "at least one sub-group") for config in (XE, GENERIC)),
    *((config, dict(prefetch_distance=16), "prefetch_distance must be from 0 to 15, got 16") for config in (XE, OUTER_XE)),
    *((config, dict(isa="avx9"), "isa must be one of amx_fp16, amx, avx512_bf16, avx512, avx2, baseline, got 'avx9'") for config in (CPU, OUTER_CPU)),
    *((CPU, dict(micro_columns=value), "micro_columns must be a multiple of 8 with avx2") for value in (0, 4, 20)),
    (OUTER_CPU, dict(micro_columns=24), "micro_columns must be a multiple of 16 with avx512"),
    *((CPU, dict(micro_rows=value), "in at most 16 registers of 8 dwords") for value in (0, 9)),
    (OUTER_CPU, dict(micro_rows=17), "in at most 32 registers of 16 dwords"),
    *((CPU, dict(k_block=value), "k_block must be a multiple of 16 with avx2") for value in (0, 8, 24)),
    (CPU, dict(unpacked_rows=0), "unpacked_rows must be at least 1"),
    *((CPU, dict(dot_rows=value), f"dot_rows must be from 1 to 8, got {value}") for value in (0, 9)),
    (CPU, dict(prefetch_columns=-1), "prefetch_columns must be from 0"),
    (CPU, dict(threads=-1), "threads must be from 0"),
    *((config, {name: 0}, f"{name} {AT_LEAST_ONE}") for config in (OUTER_XE, OUTER_GENERIC, OUTER_CPU) for name in OUTER),
    *((config, {name: 0}, "multiples of the sub-group's") for config in (OUTER_XE, OUTER_GENERIC) for name in OUTER_PARTS),
    *((config, {name: 48}, "multiples of the sub-group's") for config in (OUTER_XE, OUTER_GENERIC) for name in OUTER_PARTS),
    *((OUTER_CPU, dict(row_block=value), "row_block must be a multiple of 2 rows with avx512") for value in (0, 7)),
    *((config, dict(micro_rows=16), "must be 32 x 32 with amx, got 16 x 32") for config in (CPU_AMX, OUTER_AMX)),
    (OUTER_AMX, dict(row_block=48), "row_block must be a multiple of 32 rows with amx"),
]


@pytest.mark.parametrize("config, change, message", WRONG)
def test_a_wrong_value_names_the_rule(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


@pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)
def test_a_wrong_type_names_the_field(config):
    for field in dataclasses.fields(config):
        for value in (None, 1.5, True, "64" if field.name != "isa" else 64, [64, 32], (64, 32.0), object):
            with pytest.raises(TypeError, match=f"^{field.name} must be (of type|a tuple of int)"):
                replace(config, **{field.name: value})


def test_a_configuration_is_of_a_kind():
    for kind in (TileConfig, OuterConfig):
        with pytest.raises(TypeError, match="abstract"):
            kind(**(TILES if kind is TileConfig else OUTER))


@pytest.mark.parametrize("kind, fields, message", [
    (GemmConfigs, dict(forward=OUTER_CPU), "forward must be a TileConfig, or None, got OuterCpuConfig"),
    (GemmConfigs, dict(dX="dynamic"), "dX must be a TileConfig, or None, got str"),
    (GemmConfigs, dict(dW=CPU), "dW must be a OuterConfig, or None, got CpuConfig"),
    (MoeConfig, dict(gate_up=OUTER_CPU), "gate_up must be a GemmConfigs or TileConfig, or None, got OuterCpuConfig"),
    (MoeConfig, dict(down=MoeConfig()), "down must be a GemmConfigs or TileConfig, or None, got MoeConfig")])
def test_the_parts_of_several_configurations(kind, fields, message):
    with pytest.raises(TypeError, match=message):
        kind(**fields)


@pytest.mark.parametrize("config, text", [
    (XE, "XeConfig(64/32 x 128, sub-groups 32x64/32x32, prefetch 3, 256 registers, dynamic)"),
    (replace(GENERIC, schedule=Schedule.static), "GenericConfig(64/32 x 128, sub-groups 32x64/32x32, static)"),
    (replace(GENERIC, splits=4), "GenericConfig(64/32 x 128, sub-groups 32x64/32x32, 4 splits, dynamic)"),
    (CPU, "CpuConfig(64/32 x 128, avx2, blocks 6x16x256, in place up to 6 rows, 2 at a time, 16 columns ahead, dynamic)"),
    (replace(CPU, threads=3), "CpuConfig(64/32 x 128, avx2, blocks 6x16x256, in place up to 6 rows, 2 at a time, 16 columns "
                              "ahead, 3 threads, dynamic)"),
    (OUTER_XE, "OuterXeConfig(64 x 128, sub-groups 32x64, prefetch 4, 2 splits)"),
    (OUTER_GENERIC, "OuterGenericConfig(64 x 128, sub-groups 32x64, 2 splits)"),
    (OUTER_CPU, "OuterCpuConfig(64 x 128, avx512, blocks 14x32x128, 2 splits)")])
def test_how_it_reads(config, text):
    assert str(config) == text


def test_what_a_launch_takes():
    assert GENERIC.sub_groups == (4, 4)
    assert (XE.work_group_size, CPU.work_group_size, OUTER_XE.work_group_size, OUTER_CPU.work_group_size) == (64, 1, 64, 1)
    assert (XE.work_groups(20), CPU.work_groups(20), replace(CPU, threads=3).work_groups(20), OUTER_CPU.work_groups(20)) == (20, 20, 3, 20)
    assert (XE.computed_rows(64, 5), CPU.computed_rows(64, 5)) == (64, 5)


def test_scratch_grows_with_what_is_packed():
    def scratch(config, k=100, **fields):
        return config.scratch_bytes(GroupedGemmProblem(64, k, Dtype.bf16, Dtype.bf16, **fields))

    assert scratch(XE) == scratch(GENERIC) == 0 < scratch(CPU) < scratch(replace(CPU, heights=(128,)))
    assert scratch(CPU, 300) - scratch(CPU, 256) > 4 * 64 * 128      # sums between two blocks of K
    zeros = Quantization(Codes.int4, ScaleType.f32, 1, 32, zeros=True)
    assert scratch(replace(CPU, unpacked_rows=64), quantization=zeros) > scratch(CPU, quantization=zeros) == scratch(CPU)    # sums of rows


def test_an_entry_of_the_list_has_room_for_the_sums_of_all_parts():
    assert XE.entry_bytes == GENERIC.entry_bytes == CPU.entry_bytes == OUTER_CPU.entry_bytes == 16
    assert replace(XE, splits=3).entry_bytes == replace(GENERIC, splits=3).entry_bytes == 32 + 3 * 4 * 64 * 128
    assert replace(CPU, splits=2).entry_bytes == 32 + 2 * 4 * 64 * (128 + 16)
