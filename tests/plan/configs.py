"""Configurations drawn at random, by kind; their classes take them all, `rules.py` not for every problem."""
from hypothesis import strategies as st

from moe_xe.plan.gemm.config import TILE_INPUTS, TILE_SIDE, VECTOR_DWORDS, VECTOR_REGISTERS, CpuConfig, GenericConfig, Schedule, XeConfig
from moe_xe.plan.outer.config import OuterCpuConfig, OuterGenericConfig, OuterXeConfig

ISAS = list(VECTOR_DWORDS)


@st.composite
def tiles(draw, heights, widths, splits):
    """The fields of every TileConfig."""
    return dict(heights=tuple(sorted(draw(st.sets(heights, min_size=1, max_size=3)), reverse=True)), tile_width=draw(widths),
                raster_group=draw(st.integers(1, 9)), min_fill_eighths=draw(st.integers(1, 8)),
                schedule=draw(st.sampled_from(Schedule)), splits=draw(st.integers(1, splits)))


@st.composite
def micro_kernels(draw, isas, pairs=False):
    """isa, micro_rows and micro_columns."""
    isa = draw(st.sampled_from(isas))
    if isa in TILE_INPUTS:
        return dict(isa=isa, micro_rows=2 * TILE_SIDE, micro_columns=2 * TILE_SIDE)
    vectors = draw(st.sampled_from([2, 4] if pairs else [1, 2, 3, 4]))
    return dict(isa=isa, micro_rows=draw(st.integers(1, VECTOR_REGISTERS[isa] // vectors)), micro_columns=vectors * VECTOR_DWORDS[isa])


@st.composite
def cpu_configs(draw, isas=ISAS, pairs=False, splits=4):
    micro = draw(micro_kernels(isas, pairs))
    return CpuConfig(**draw(tiles(st.integers(1, 50), st.integers(1, 60).map(lambda half: 2 * half), splits)), **micro,
                     k_block=2 * VECTOR_DWORDS[micro["isa"]] * draw(st.integers(1, 4)), unpacked_rows=draw(st.integers(1, 12)),
                     dot_rows=draw(st.integers(1, 5)), prefetch_columns=draw(st.integers(0, 20)), prefetch_bytes=draw(st.integers(0, 8192)),
                     threads=draw(st.integers(0, 3)))


@st.composite
def sub_group_tiles(draw, columns, splits=4):
    """The fields of every SubGroupConfig, in tiles that take as many sub-groups whatever their height. Small: the CPU
    device's compiler takes long over large blocks."""
    rows, part = draw(st.integers(1, 4)), draw(st.sampled_from(columns))
    fields = draw(tiles(st.integers(1, 3).map(lambda parts: parts * rows), st.integers(1, 3).map(lambda parts: parts * part), splits))
    return dict(fields, sub_group_rows=(rows,) * len(fields["heights"]), sub_group_columns=(part,) * len(fields["heights"]))


def generic_configs(columns=(16, 32), splits=4):
    return sub_group_tiles(columns, splits).map(lambda fields: GenericConfig(**fields))


def xe_configs():
    return st.builds(lambda fields, distance: XeConfig(**fields, prefetch_distance=distance), sub_group_tiles((16, 32, 64)),
                     st.integers(0, 15))


def outer_cpu_configs(isas=ISAS, splits=3):
    def config(micro, blocks, *rest):
        return OuterCpuConfig(*rest, **micro, row_block=blocks * (2 * TILE_SIDE if micro["isa"] in TILE_INPUTS else 2))

    return st.builds(config, micro_kernels(isas), st.integers(1, 40), st.integers(1, 50), st.integers(1, 120), st.integers(1, splits))


@st.composite
def _outer_tiles(draw, splits):
    rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from((16, 32)))
    return dict(tile_rows=rows * draw(st.integers(1, 3)), tile_columns=columns * draw(st.integers(1, 3)), splits=draw(st.integers(1, splits)),
                sub_group_rows=rows, sub_group_columns=columns)


def outer_generic_configs(splits=3):
    return _outer_tiles(splits).map(lambda fields: OuterGenericConfig(**fields))


def outer_xe_configs(splits=3):
    return st.builds(lambda fields, distance: OuterXeConfig(**fields, prefetch_distance=distance), _outer_tiles(splits), st.integers(0, 15))


def tile_configs():
    return st.one_of(cpu_configs(), generic_configs(), xe_configs())


def outer_configs():
    return st.one_of(outer_cpu_configs(), outer_generic_configs(), outer_xe_configs())
