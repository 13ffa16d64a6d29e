"""AMX's tiles on the CPU device: on a CPU that has them; on others, everything around their instructions."""
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_xe import runtime
from moe_xe.isa import spirv
from moe_xe.jit import sources_dir
from moe_xe.jit.source import generate
from moe_xe.ops import launch
from moe_xe.ops.calls import known_calls
from moe_xe.ops.gemm import grouped_outer
from moe_xe.plan.gemm.config import TILE_INPUTS
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.problem import Dtype, GroupedGemmProblem, RowScale

from . import test_fused_epilogues_cpu_device as fused
from . import test_int8_cpu_device as int8
from . import test_mainloops_cpu_device as mainloops
from . import test_outer_cpu_device as outer
from . import test_quantised_cpu_device as quantised

STAND_IN = Path(__file__).parent / "software_tiles"
INT8 = Quantization(Codes.int8, ScaleType.f32, 1, 160)
HEADER = STAND_IN / "moe_xe" / "cpu" / "tile_registers.hpp"
COUNTS = [5, 0, 1, 47, 2, 16, 33]      # read in place, one tile of rows, two, a rest


def use_stand_in(monkeypatch):
    options = f"-I{STAND_IN}", f"-DMOE_XE_STAND_IN=0x{hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]}"
    for module, name in ((launch, "grouped_gemm_source"), (grouped_outer, "grouped_outer_source")):
        source = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, source=source: replace(source(*args), options=options))


@pytest.fixture
def tiles(monkeypatch):
    if runtime.cpu_isa() == "avx512_bf16":
        use_stand_in(monkeypatch)
    elif runtime.cpu_isa() not in TILE_INPUTS:
        pytest.skip("this CPU has no AMX, and not what is around it either: avx512_bf16")


@pytest.fixture
def fp16_tiles(monkeypatch):
    """What is around them are vectors of any instruction set."""
    if runtime.cpu_isa() != "amx_fp16":
        use_stand_in(monkeypatch)


def config(isa="amx", **changes):
    """Several tiles of rows and blocks of K; one row is read in place."""
    return mainloops.cpu(isa, **{"heights": (40,), "unpacked_rows": 1, **changes})


@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_stand_in_is_as_the_registers(layout, monkeypatch):
    """But for the order in which two products are added."""
    if runtime.cpu_isa() not in TILE_INPUTS:
        pytest.skip("this CPU has no AMX")
    case = mainloops.make(COUNTS, 96, 160, layout=layout, out_dtype=torch.float32)
    found = case.run(config())
    known_calls().clear()
    use_stand_in(monkeypatch)
    torch.testing.assert_close(found, case.run(config()), rtol=1e-5, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("n, k", [(101, 149), (96, 160)], ids=["packed", "as they lie"])
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_everything_at_once(layout, n, k, tiles):
    mainloops.make(COUNTS, n, k, layout=layout, gathered=True, bias=torch.float32, gap=3).check(config())


@pytest.mark.few(1)
@pytest.mark.parametrize("name", fused.FIRST)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_first_gemm(layout, name, tiles):
    fused.make(layout, torch.bfloat16, counts=COUNTS, k=160, **fused.FIRST[name]).check(config())


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_second_gemm_with_k_in_parts(layout, tiles):
    fused.make(layout, torch.bfloat16, counts=[3, 0, 1, 9, 0], k=1120, scattered=True, out_dtype=torch.float32,
               row_scale=RowScale.outputs).check(config(tile_width=64, splits=4))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", quantised.MAIN_KINDS, ids=str)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_codes(layout, kind, tiles):
    quantised.make(kind, COUNTS, layout=layout).check(config())


@pytest.mark.few(2)
@pytest.mark.parametrize("k", [150, 192], ids=["packed", "as they lie"])
@pytest.mark.parametrize("activation, n", [(None, 69), (int8.SILU, 70), (int8.OAI, 70)], ids=["none", "halves", "interleaved"])
def test_int8(activation, n, k, tiles):
    int8.check(int8.make(n, k, COUNTS, activation=activation), config())


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_long_sums(layout, tiles):
    """More elements of K than a register sums."""
    mainloops.make([20], n=64, k=4129, layout=layout).check(config(k_block=4160))


@pytest.mark.few(1)
@pytest.mark.parametrize("gathered", ["none", "left", "right"])
def test_gradient_of_weights(gathered, tiles):
    outer.make(counts=[5, 0, 1, 47, 2, 33, 70], gathered=gathered, accumulate=gathered == "left", gap=3).check(
        outer.cpu("amx", tile_rows=40, row_block=32))


@pytest.mark.few(2)
@pytest.mark.parametrize("n, k", [(101, 149), (96, 160)], ids=["packed", "as they lie"])
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_fp16(layout, n, k, fp16_tiles):
    mainloops.make(COUNTS, n, k, torch.float16, layout, gathered=True, bias=torch.float32, gap=3).check(config("amx_fp16"))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", fused.FIRST)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_first_gemm_in_fp16(layout, name, fp16_tiles):
    fused.make(layout, torch.float16, counts=COUNTS, k=160, **fused.FIRST[name]).check(config("amx_fp16"))


@pytest.mark.few(1)
@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_second_gemm_in_fp16_with_k_in_parts(layout, fp16_tiles):
    fused.make(layout, torch.float16, counts=[3, 0, 1, 9, 0], k=1120, scattered=True, out_dtype=torch.float32,
               row_scale=RowScale.outputs).check(config("amx_fp16", tile_width=64, splits=4))


@pytest.mark.parametrize("layout", mainloops.LAYOUTS)
def test_small_and_large_numbers_of_fp16(layout, fp16_tiles):
    """Numbers without a leading one, and products that fp16 cannot hold."""
    case = mainloops.make(COUNTS, 40, 96, torch.float16, layout, out_dtype=torch.float32)
    case.a.mul_(2.0**-18), case.w.mul_(2.0**13)
    assert (case.a.abs() < 2.0**-14).any()
    case.check(config("amx_fp16"))
    large = mainloops.make(COUNTS, 40, 96, torch.float16, layout, out_dtype=torch.float32)
    large.a.mul_(2.0**12), large.w.mul_(2.0**12)
    large.check(config("amx_fp16"))


@pytest.mark.few(1)
@pytest.mark.parametrize("gathered", ["none", "left", "right"])
def test_gradient_of_fp16_weights(gathered, fp16_tiles):
    outer.make(counts=[5, 0, 1, 47, 2, 33, 70], dtype=torch.float16, gathered=gathered, accumulate=gathered == "left", gap=3).check(
        outer.cpu("amx_fp16", tile_rows=40, row_block=32))


@pytest.mark.parametrize("product, options", [(b"tdpbf16ps", {}), (b"tdpfp16ps", dict(input=Dtype.f16)),
                                              (b"tdpbssd", dict(input=Dtype.i8, quantization=INT8))], ids=["bf16", "fp16", "int8"])
def test_kernels_compile(product, options):
    """Also where no CPU could run them."""
    problem = replace(GroupedGemmProblem(100, 160, Dtype.bf16, Dtype.bf16), **options)
    image = spirv.compile_to_spirv(generate(problem, cpu_config(problem, "amx_fp16")), [f"-I{sources_dir()}/include", f"-I{sources_dir()}"])
    assert all(instruction in image for instruction in (b"ldtilecfg", b"tileloadd", product, b"tilestored", b"tilerelease"))
