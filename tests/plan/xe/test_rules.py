"""The rules of Xe configurations: each names its reason, and the hard ones agree with what the kernels assert."""
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest

from moe_xe.isa import kernels, ocloc, spirv
from moe_xe.isa.listing import summarize
from moe_xe.jit.shipped_sources import sources_dir
from moe_xe.jit.source import generate
from moe_xe.plan.xe import rules as xe_rules
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.xe.candidates import check_xe_config
from moe_xe.plan.gemm.config import GenericConfig, Schedule, XeConfig
from moe_xe.plan.model.devices import DeviceRecord, record_named
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem, WeightLayout

B60 = record_named("b60")
ENK, EKN = WeightLayout.enk, WeightLayout.ekn
HALVES, WOVEN = Activation(), Activation(interleaved=True)


def gemm(n=512, k=256, layout=ENK, activation=None, gathered=False, dtype=Dtype.bf16, output=None):
    return GroupedGemmProblem(n, k, dtype, output or dtype, layout, activation=activation, gathered=gathered, tf32=dtype is Dtype.f32)


def codes(dtype=Dtype.bf16, layout=ENK, scales=ScaleType.f16, columns=128, zeros=False):
    return replace(gemm(layout=layout, dtype=dtype), quantization=Quantization(Codes.int4, scales, 1, columns, zeros=zeros))


def tile(height, width, rows, columns, prefetch_distance=3):
    return XeConfig((height,), width, 8, 7, Schedule.dynamic, (rows,), (columns,), prefetch_distance)


CASES = [
    (gemm(), tile(64, 256, 8, 64), "sub-groups: 8x64 are not multiples of dpas' 16x8"),
    (gemm(layout=EKN), tile(64, 256, 32, 8), "sub-groups: 32x8 are not multiples of dpas' 8x16"),
    (gemm(), tile(48, 256, 32, 64), "sub-groups: 32x64 do not divide the tile"),
    (gemm(), tile(64, 128, 16, 128), "registers: sums, operands of a step and addresses take 288 of 256"),
    (gemm(), tile(256, 256, 16, 64), "threads: 64 sub-groups, an Xe core has 32"),
    (gemm(), tile(48, 256, 16, 64), "prefetch: 256 columns' lines cannot be shared out evenly to 12"),
    (gemm(), tile(64, 384, 32, 64), None),
    (gemm(), tile(64, 32, 64, 32), "prefetch: more than 32 rows a sub-group"),
    (gemm(), tile(16, 144, 16, 48), "messages: 48 columns of weights"),
    (gemm(), tile(16, 192, 16, 24), "messages: 24 outputs a row"),
    (gemm(activation=HALVES), tile(16, 256, 16, 8), "pairs: gate and up values need multiples of 16 columns, got 8"),
    (gemm(activation=WOVEN), tile(16, 256, 16, 8), "pairs: gate and up values need multiples of 16 columns, got 8"),
    (gemm(activation=HALVES), tile(16, 64, 16, 64), "prefetch: gates and up values need an even number of sub-groups, got 1"),
    (gemm(activation=WOVEN), tile(16, 64, 16, 64), None),
    (gemm(layout=EKN), tile(64, 128, 64, 32), "messages: more than 32 rows"),
    (gemm(layout=EKN), tile(8, 192, 8, 48), "messages: 48 columns are neither 16 nor a multiple of 32"),
    (gemm(layout=EKN, activation=WOVEN), tile(8, 192, 8, 96), "messages: 48 columns are neither"),
    (gemm(layout=EKN, activation=WOVEN, output=Dtype.f32), tile(24, 192, 8, 96), None),
    (gemm(layout=EKN, activation=WOVEN, output=Dtype.f32), tile(16, 192, 8, 96), "prefetch: 192 columns' lines cannot be shared"),
    (gemm(layout=EKN), tile(32, 48, 16, 16), "prefetch: 32 rows of K cannot be shared"),
    (gemm(layout=EKN, dtype=Dtype.f32), tile(8, 384, 8, 64), None),
    (gemm(layout=EKN, gathered=True), tile(128, 256, 32, 64), None),
    (gemm(gathered=True), tile(16, 512, 16, 64, prefetch_distance=15), None),
    (codes(), tile(256, 256, 64, 32), None),
    (codes(dtype=Dtype.f16, zeros=True), tile(256, 256, 64, 32), None),
    (codes(dtype=Dtype.f16, scales=ScaleType.f32, zeros=True), tile(256, 256, 64, 32),
     "registers: sums, operands of a step and addresses take 268 of 256"),
    (codes(columns=32, zeros=True), tile(128, 256, 32, 64), "registers: sums, operands of a step and addresses take 288 of 256"),
    (codes(layout=EKN), tile(64, 256, 32, 64), None),
    (codes(layout=EKN), tile(24, 384, 8, 96), "messages: 96 columns of codes are no power of two"),
    (codes(layout=EKN), tile(128, 64, 32, 16), "prefetch: 32 rows of K cannot be shared out evenly to 16"),
]
IDS = [f"{problem.weights.value} {config.heights[0]}x{config.tile_width} {config.sub_group_rows[0]}x{config.sub_group_columns[0]} {i}"
       for i, (problem, config, _) in enumerate(CASES)]


@pytest.mark.parametrize("problem, config, reason", CASES, ids=IDS)
def test_what_can_be_compiled_and_launched(problem, config, reason):
    if reason is None:
        return check_xe_config(problem, config, B60)
    with pytest.raises(ValueError, match="config's tile .*in sub-groups") as error:
        check_xe_config(problem, config)
    assert reason in str(error.value)


ASSERTED = [case for case, (_, _, reason) in zip(zip(CASES, IDS), CASES) if reason is None or "cannot be shared" in reason]


@pytest.mark.few(3)
@pytest.mark.skipif(bool(spirv.missing()), reason=spirv.missing() or "-")
@pytest.mark.parametrize("case", [case for case, _ in ASSERTED], ids=[name for _, name in ASSERTED])
def test_the_kernels_assertions_agree(case):
    """What passes compiles; prefetch that cannot be shared out does not. Other rules are about what a launch or a message takes."""
    problem, config, reason = case
    root = sources_dir()

    with pytest.raises(spirv.CompileError) if reason else nullcontext():
        spirv.compile_to_spirv(generate(problem, config), [f"-I{root / 'include'}", f"-I{root}"])


@pytest.mark.skipif(bool(spirv.missing() or ocloc.missing()), reason=spirv.missing() or ocloc.missing() or "-")
def test_prefetch_distances_have_the_same_loop():
    """Instructions were counted three steps ahead."""
    problem = gemm(gathered=True, k=1024)
    three, eight = (summarize(kernels.build(problem, tile(64, 256, 32, 64, distance), "bmg"), "grouped_gemm").loops[0] for distance in (3, 8))
    assert (three.dpas, three.messages) == (eight.dpas, eight.messages) and three.instructions == pytest.approx(eight.instructions, rel=0.02)


def test_no_xe_config():
    with pytest.raises(TypeError, match="config must be an XeConfig, got GenericConfig"):
        check_xe_config(gemm(), GenericConfig((16,), 64, 8, 7, Schedule.dynamic, (16,), (64,)))
    with pytest.raises(ValueError, match="device must be an Xe GPU with an architecture, got a CPU"):
        check_xe_config(gemm(), tile(16, 256, 16, 64), DeviceRecord("a CPU", 2, {"bf16": 1.0}, 30, "-"))


def test_soft_rules_do_not_reject():
    wide, deep = tile(16, 512, 16, 64), tile(256, 256, 32, 64, prefetch_distance=15)
    assert xe_rules.width_reason(gemm(n=64), 512, (512, 64)).startswith("tail: pads N = 64 to 512, another width to 64")
    assert xe_rules.width_reason(gemm(n=64), 64, (512, 64)) is None
    assert xe_rules.cache_reason(deep, B60).startswith("L1: ") and xe_rules.cache_reason(replace(deep, prefetch_distance=3), B60) is None
    assert xe_rules.shape_spills(gemm(), 64, 32, B60).startswith("spills: not among") and xe_rules.shape_spills(gemm(), 32, 64, B60) is None
    check_xe_config(gemm(n=64), wide)
    check_xe_config(gemm(), deep)
    check_xe_config(gemm(), tile(128, 256, 64, 32))


def test_gathered_tokens_leave_few_registers():
    gathered = gemm(gathered=True)
    for height, width, reason in ((32, 256, "spills: .* two messages"), (128, 512, "spills: .* four lines"), (64, 256, None), (256, 256, None)):
        found = xe_rules.tile_spills(gathered, height, width, 32, 64)
        assert found is None if reason is None else re.match(reason, found)
        assert xe_rules.tile_spills(gemm(), height, width, 32, 64) is None
