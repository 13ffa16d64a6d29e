"""Configurations as text and back."""
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_xe.plan.choice.block_config import GemmConfigs, MoeConfig
from moe_xe.plan.choice.text import KINDS, from_text, to_text
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.problem import Dtype, GroupedGemmProblem

from ..configs import outer_configs, tile_configs

PROBLEM = GroupedGemmProblem(64, 64, Dtype.bf16, Dtype.bf16)
CPU = json.loads(to_text(cpu_config(PROBLEM, "avx2")))


def gemm_configs():
    return st.builds(GemmConfigs, st.none() | tile_configs(), st.none() | tile_configs(), st.none() | outer_configs())


@given(st.one_of(tile_configs(), outer_configs(), gemm_configs(),
                 st.builds(MoeConfig, st.none() | tile_configs() | gemm_configs(), st.none() | tile_configs() | gemm_configs())))
def test_text_says_all(config):
    text = to_text(config)
    assert "\n" not in text and json.loads(text)["kind"] == type(config).__name__
    assert from_text(text) == config and type(from_text(text)) is type(config)


def test_fields_with_defaults_may_be_left_out():
    assert from_text(json.dumps({name: value for name, value in CPU.items() if name != "threads"})) == cpu_config(PROBLEM, "avx2")
    assert from_text('{"kind": "MoeConfig"}') == MoeConfig()


def changed(**changes) -> str:
    return json.dumps(CPU | changes)


A_KIND = f"must have a kind of {', '.join(KINDS)}"
WRONG = [
    ("", "must be JSON"), ("autotune", "must be JSON"), ("{'kind': 1}", "must be JSON"), ("[" * 100_000, "must be JSON"),
    ("[]", A_KIND), ("{}", A_KIND), ("5", A_KIND), ("null", A_KIND), ('{"kind": "TileConfig"}', A_KIND), ('{"kind": ["CpuConfig"]}', A_KIND),
    ('{"kind": "CpuConfig"}', "a CpuConfig must have the fields heights, tile_width, .*, got none"),
    (changed(height=3), "must have the fields"), (json.dumps({**CPU, "isa": None}), "isa must be of type str, got None"),
    (json.dumps({name: value for name, value in CPU.items() if name != "isa"}), "must have the fields"),
    (changed(tile_width="192"), "tile_width must be of type int, got '192'"),
    (changed(tile_width=192.0), "tile_width must be of type int, got 192.0"), (changed(tile_width=True), "tile_width must be of type int"),
    (changed(tile_width=CPU), "tile_width must be of type int, got CpuConfig"),
    (changed(heights=168), "heights must be a tuple of int, got 168"), (changed(heights=[1.5]), "heights must be a tuple of int"),
    (changed(heights=[[168]]), "heights must be a tuple of int"), (changed(heights={"0": 168}), A_KIND),
    (changed(schedule="fast"), "schedule must be of type Schedule, got 'fast'"), (changed(schedule=["dynamic"]), "schedule must be of type"),
    (changed(isa=2), "isa must be of type str, got 2"), (changed(isa="avx9"), "isa must be one of"), (changed(k_block=7), "k_block must be"),
    ('{"kind": "GemmConfigs", "forward": 5}', "forward must be a TileConfig, or None, got int"),
    ('{"kind": "GemmConfigs", "forward": "autotune"}', "forward must be a TileConfig, or None, got str"),
    (json.dumps({"kind": "GemmConfigs", "dW": CPU}), "dW must be a OuterConfig, or None, got CpuConfig"),
    ('{"kind": "MoeConfig", "down": {"kind": "MoeConfig"}}', "down must be a GemmConfigs or TileConfig"),
    ('{"kind": "MoeConfig", "down": {"kind": "GemmConfigs", "dX": {"kind": "CpuConfig"}}}', "a CpuConfig must have the fields"),
]


@pytest.mark.parametrize("text, message", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_with_a_text(text, message):
    with pytest.raises(ValueError, match=message):
        from_text(text)
