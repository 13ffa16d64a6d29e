"""What callers may say about configurations, and what of it each GEMM gets."""
import re

import pytest
from hypothesis import given

from moe_xe.plan.choice.block_config import GemmConfigs, MoeConfig
from moe_xe.plan.choice.choice import Choice
from moe_xe.plan.gemm.config import TileConfig
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.config import OuterConfig
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

from ..configs import tile_configs

PROBLEM = GroupedGemmProblem(64, 64, Dtype.bf16, Dtype.bf16)
FIRST, SECOND, THIRD, OUTER = cpu_config(PROBLEM, "avx2"), cpu_config(PROBLEM, "baseline"), cpu_config(PROBLEM, "avx512"), cpu_outer_config("avx2")
GEMM = GemmConfigs(forward=FIRST, dX=SECOND, dW=OUTER)
NOTHING, TUNED = Choice(), Choice(autotune=True)
PARTS = ("forward", "dX", "dW")


def parts(choice: Choice, *names: str) -> tuple:
    return tuple(choice.part(name).config for name in names)


def test_each_gemm_gets_its_own():
    assert parts(Choice(GEMM), *PARTS) == (FIRST, SECOND, OUTER)
    assert parts(Choice(FIRST), *PARTS) == (FIRST, None, None)      # a gradient is of another problem
    assert parts(NOTHING, *PARTS, "gate_up", "down") == (None,) * 5
    assert parts(Choice(OUTER), *PARTS) == (None,) * 3
    block = Choice(MoeConfig(gate_up=GEMM, down=THIRD))
    assert parts(block, "gate_up", "down") == (GEMM, THIRD)
    assert parts(block.part("gate_up"), *PARTS) == (FIRST, SECOND, OUTER)
    assert parts(block.part("down"), *PARTS) == (THIRD, None, None)
    assert parts(Choice(MoeConfig(down=GemmConfigs(dW=OUTER))).part("gate_up"), *PARTS) == (None,) * 3


def test_the_tuner_chooses_for_every_part():
    for name in (*PARTS, "gate_up", "down"):
        assert TUNED.part(name) == TUNED.part(name).part("forward") == TUNED
        assert not Choice(GEMM).part(name).autotune


def test_texts():
    assert (NOTHING.text, TUNED.text) == ("", "autotune")
    for choice in (NOTHING, TUNED, Choice(FIRST), Choice(OUTER), Choice(GEMM), Choice(MoeConfig(GEMM, THIRD))):
        assert Choice.parse(choice.text) == choice


@given(tile_configs())
def test_texts_of_any_configuration(config):
    assert Choice.parse(Choice(config).text) == Choice(config)


@pytest.mark.parametrize("text", ["autotune ", "Autotune", "{}", "null"])
def test_other_texts(text):
    with pytest.raises(ValueError, match="a configuration must"):
        Choice.parse(text)


def test_arguments():
    assert Choice.of(None, False, TileConfig) == NOTHING and Choice.of(None, True, TileConfig) == TUNED
    assert Choice.of(FIRST, False, TileConfig) == Choice(FIRST)
    assert Choice.of(*Choice(FIRST).arguments.values(), TileConfig) == Choice(FIRST)


@pytest.mark.parametrize("config, autotune, kinds, error, message", [
    (None, 1, [TileConfig], TypeError, "autotune must be True or False, got 1"),
    (None, None, [TileConfig], TypeError, "autotune must be True or False, got None"),
    (None, "autotune", [TileConfig], TypeError, "autotune must be True or False, got 'autotune'"),
    (OUTER, False, [TileConfig, GemmConfigs], TypeError, "config must be a TileConfig or GemmConfigs, or None, got OuterCpuConfig"),
    (FIRST, False, [OuterConfig], TypeError, "config must be a OuterConfig, or None, got CpuConfig"),
    ("autotune", False, [TileConfig], TypeError, "config must be a TileConfig, or None, got str"),
    (FIRST, True, [TileConfig], ValueError, "config must be None with autotune=True, got CpuConfig(168 x 192")])
def test_wrong_arguments(config, autotune, kinds, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Choice.of(config, autotune, *kinds)
