"""Budgets: instructions of a 32x64 sub-group tile outside the K loop, on bmg in xesim."""
from __future__ import annotations

import pytest

from . import case
from .case import EKN, ENK, missing
from .tile_cost import problem_of, tile_cost

pytestmark = pytest.mark.skipif(bool(missing), reason=missing)

BUDGETS = {"plain": 340, "silu of halves": 600, "scattered f32": 500, "scattered f32, bias": 620, "scattered bf16": 550,
           "swiglu of neighbours, bias": 1250}
LIKE_OTHERS = ("scattered f32", "scattered bf16", "swiglu of neighbours, bias")


@pytest.mark.parametrize("layout", [ENK, EKN])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind in LIKE_OTHERS)) for kind in BUDGETS])
def test_ends_of_a_tile(kind, layout):
    cost = tile_cost(problem_of(kind, layout))
    case.REPORT.append(f"{kind}, {layout.value}, 32x64: {cost}")
    assert 0 < cost.tile <= BUDGETS[kind]
