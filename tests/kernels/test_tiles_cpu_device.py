"""AMX's tiles on the CPU device: on a CPU that has them, and everything around their instructions on one with AVX-512 alone."""
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_xe import runtime
from moe_xe.ops import launch
from moe_xe.ops.gemm import grouped_outer

from .test_mainloops_cpu_device import cpu, make

STAND_IN = Path(__file__).parent / "software_tiles"
HEADER = STAND_IN / "moe_xe" / "cpu" / "tile_registers.hpp"


@pytest.fixture(params=["tiles", "stand-in"], autouse=True)
def tiles(request, monkeypatch):
    isa = runtime.cpu_isa()
    if request.param == "tiles":
        if isa != "amx":
            pytest.skip("this CPU has no AMX")
        return
    if not isa.startswith("avx512"):
        pytest.skip("needs AVX-512 without AMX")
    options = f"-I{STAND_IN}", f"-DMOE_XE_STAND_IN=0x{hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]}"
    for module, name in ((launch, "grouped_gemm_source"), (grouped_outer, "grouped_outer_source")):
        source = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, source=source: replace(source(*args), options=options))


@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("k", [160, 149])
def test_blocks(layout, k):
    make(counts=[5, 0, 1, 47, 2, 16, 33], n=101, k=k, layout=layout, gathered=True, bias=torch.float32, gap=3).check(
        cpu("amx", heights=(40,), unpacked_rows=1))


@pytest.mark.parametrize("gathered", list(Gathered), ids=lambda gathered: gathered.value)
def test_gradient_of_weights(gathered):
    make_outer(counts=[5, 0, 1, 47, 2, 33, 70], gathered=gathered).check(outer_cpu("amx", tile_rows=40, tile_columns=96, row_block=32))
