"""Problem + operands + device -> everything that one launch needs, as a plain value."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from .gemm import heuristics
from .gemm.config import RECORD_BYTES, Schedule, TileConfig, num_entries
from .gemm.heuristics import Family
from .model.devices import DeviceRecord
from .outer import heuristics as outer_heuristics
from .outer.config import OuterConfig, OuterOperands, OuterProblem
from .override import forced_config
from .problem import GroupedGemmProblem, Operands
from .rules import check_config, check_outer_config, check_outer_queue, check_queue, check_splits


@dataclass(frozen=True)
class Target:
    """What the plan must know of a device. cores: Xe cores, or compute units; record: of an Xe GPU with wide dpas.

    isa: the CPU's vector instructions that kernels use; best_isa: the newest that it has.
    """
    is_cpu: bool
    cores: int
    has_dpas: bool
    isa: str | None = None
    best_isa: str | None = None
    record: DeviceRecord | None = None


class Origin(str, Enum):
    """Who chose a configuration."""
    forced = "forced"
    given = "given"
    tuned = "tuned"
    chosen = "chosen"


QUEUE_WORDS = 4         # of sycl_kernels/include/moe_xe/queue/tile_list.hpp: int32 words that are zero before a launch

Problem = TypeVar("Problem", GroupedGemmProblem, OuterProblem)
Config = TypeVar("Config", TileConfig, OuterConfig)


@dataclass(frozen=True)
class LaunchPlan(Generic[Problem, Config]):
    """One launch: what to compile, how many work-groups, scratch bytes of each; and who chose so."""
    problem: Problem
    config: Config
    family: Family
    num_groups: int
    group_size: int
    group_scratch_bytes: int
    origin: Origin = Origin.chosen

    def scratch_bytes(self, operands: Operands | OuterOperands) -> int:
        """Of the work-groups, of the experts' entries and of the list of tiles: however the rows are spread, an entry for each tile."""
        records = self.config.most_records(self.problem, operands.total_rows, operands.num_experts)
        entries = RECORD_BYTES * num_entries(operands.num_experts, self.problem.ranks)
        return self.num_groups * self.group_scratch_bytes + entries + self.config.entry_bytes * records

    def with_config(self, config: Config, origin: Origin, cores: int) -> LaunchPlan[Problem, Config]:
        """The same launch in another configuration."""
        return _plan(self.problem, config, self.family, cores, origin)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, config: Config, family: Family, cores: int, origin: Origin) -> LaunchPlan:
    groups = config.work_groups(cores)
    return LaunchPlan(problem, config, family, groups, config.work_group_size, config.scratch_bytes(problem), origin)


def plan_launch(problem: GroupedGemmProblem, operands: Operands, target: Target, schedule: Schedule,
                config: TileConfig | None = None) -> LaunchPlan[GroupedGemmProblem, TileConfig]:
    """The plan for one grouped GEMM; equal calls share it. config: the caller's; ValueError if it does not fit."""
    family = heuristics.choose_family(problem, operands, target.is_cpu, target.has_dpas)
    forced = forced_config(TileConfig)
    if forced is not None:
        config, origin = forced, Origin.forced
    elif config is not None:
        check_config(problem, config, family, target.best_isa)
        origin = Origin.given
    else:
        config, origin = heuristics.choose_config(
            problem, family, operands.total_rows, operands.num_experts, target.cores, isa=target.isa, record=target.record,
            schedule=schedule, most_rows=operands.most_rows), Origin.chosen
    plan = _plan(problem, config, family, target.cores, origin)
    check_queue(problem, config, operands.total_rows, operands.num_experts, plan.num_groups)
    return plan


def plan_outer(problem: OuterProblem, operands: OuterOperands, target: Target,
               config: OuterConfig | None = None) -> LaunchPlan[OuterProblem, OuterConfig]:
    """The same for a gradient of weights."""
    family = outer_heuristics.choose_outer_family(problem, operands, target.is_cpu, target.has_dpas)
    can_split = outer_heuristics.can_split(problem, operands)
    forced = forced_config(OuterConfig)
    if forced is not None:
        check_splits(forced, can_split)
        config, origin = forced, Origin.forced
    elif config is not None:
        check_splits(config, can_split)
        check_outer_config(problem, config, family, target.best_isa)
        origin = Origin.given
    else:
        config, origin = outer_heuristics.choose_outer_config(problem, operands, family, target.cores, target.isa), Origin.chosen
    plan = _plan(problem, config, family, target.cores, origin)
    check_outer_queue(problem, config, operands.num_experts, plan.num_groups)
    return plan
