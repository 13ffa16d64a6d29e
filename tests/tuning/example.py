"""A key, configurations and an entry as the ops have them."""
from __future__ import annotations

from dataclasses import dataclass, replace

from moe_xe.plan.gemm.config import Schedule
from moe_xe.plan.gemm.heuristics import cpu_config
from moe_xe.plan.outer.config import OuterProblem
from moe_xe.plan.outer.heuristics import cpu_outer_config
from moe_xe.plan.problem import Activation, Dtype, GroupedGemmProblem
from moe_xe.tuning import Entry, TuningKey, tuning_key


@dataclass(frozen=True)
class Device:
    """What a key takes of DeviceFacts."""
    name: str = "a CPU"
    kind: str = "cpu"
    backend: str = "opencl"
    architecture: str = "x86_64"
    driver_version: str = "1.2.3"
    xe_cores: int = 20


PROBLEM = GroupedGemmProblem(96, 64, Dtype.bf16, Dtype.f32, activation=Activation(alpha=1.702, limit=7.0))
OUTER = OuterProblem(96, 64, Dtype.bf16, Dtype.f32)
DEFAULT = cpu_config(PROBLEM, "baseline")
OUTER_DEFAULT = cpu_outer_config("baseline")
STATIC = cpu_config(PROBLEM, "baseline", Schedule.static)


def config(raster_group: int):
    """One of several configurations of one class."""
    return replace(DEFAULT, raster_group=raster_group)


def key(device: Device = Device(), problem=PROBLEM, num_experts: int = 8, total_rows: int = 100, skew: int | str = "unread",
        default=DEFAULT, restriction: str = "") -> TuningKey:
    op = "grouped_outer" if isinstance(problem, OuterProblem) else "grouped_gemm"
    return tuning_key(device, op, problem, num_experts, total_rows, skew, default, restriction)


def entry(best: int = 2) -> Entry:
    return Entry(config(best), DEFAULT, {DEFAULT: 12.5, config(best): 10.0, config(9): 99.0})
