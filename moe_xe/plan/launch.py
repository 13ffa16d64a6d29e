"""Problem + operands + device -> everything that one launch needs, as a plain value."""
from __future__ import annotations

import functools
from dataclasses import dataclass

from . import heuristics
from .config import Schedule, TileConfig
from .problem import GroupedGemmProblem, Operands

@dataclass(frozen=True)
class Target:
    """What the plan must know of a device. cores: Xe cores, or compute units; isa: the CPU's vector instructions."""
    is_cpu: bool
    cores: int
    has_dpas: bool
    isa: str | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """One launch: what to compile, how many work-groups, and scratch bytes for each of them."""
    problem: GroupedGemmProblem
    config: TileConfig
    num_groups: int
    group_size: int
    scratch_bytes: int


@functools.lru_cache(maxsize=4096)
def _plan(problem: GroupedGemmProblem, config: TileConfig, cores: int) -> LaunchPlan:
    return LaunchPlan(problem, config, cores, config.work_group_size, config.scratch_bytes(problem))


def plan_launch(problem: GroupedGemmProblem, operands: Operands, target: Target, schedule: Schedule) -> LaunchPlan:
    """The plan for one call; equal calls share it."""
    family = heuristics.choose_family(problem, operands, target.is_cpu, target.has_dpas)
    config = heuristics.choose_config(problem, family, operands.total_rows, target.isa, schedule)
    return _plan(problem, config, target.cores)
