"""Between plan and launch: the tuner's choice instead of the planned one, and MOE_XE_PRINT_CONFIG."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch

from ..device import facts_of, on_torchs_stream
from ..plan.launch import LaunchPlan, Origin, Target
from ..plan.model.schedule import Rows, num_rows
from ..plan.outer.config import OuterOperands
from ..plan.outer.heuristics import can_split
from ..plan.problem import Operands
from ..plan.rules import check_config, check_outer_config, check_outer_queue, check_queue, check_splits
from ..plan.trials import trial_configs
from ..runtime import Queue
from ..tuning.key import UNREAD, skew_bucket, tuning_key
from ..tuning.tuner import default_tuner, is_capturing

__all__ = ["print_config", "prints_configs", "tuned_plan"]

PRINT_VARIABLE = "MOE_XE_PRINT_CONFIG"


def tuned_plan(queue: Queue, op: str, plan: LaunchPlan, operands: Operands | OuterOperands, target: Target,
               rows: torch.Tensor, rows_format: str, run: Callable[[LaunchPlan], None]) -> LaunchPlan:
    """The plan in the tuner's configuration, which may be measured now, by doing the whole call with `run`.

    A forced configuration stays. On xpu the key says nothing of how rows are spread, which only the device knows.
    """
    if plan.origin is not Origin.chosen:
        return plan
    facts, device = facts_of(queue), rows.device
    if device.type == "cpu":
        queue.wait()        # what computes `rows` may not have run yet
        skew = skew_bucket(list(map(num_rows, _counts(rows, rows_format))))
    else:
        skew = UNREAD
    outer = isinstance(operands, OuterOperands)
    splits = not outer or can_split(plan.problem, operands)
    key = tuning_key(facts, op, plan.problem, operands.num_experts, operands.total_rows, skew, plan.config,
                     "" if splits else "unsplit")

    def check(config) -> None:
        groups = config.work_groups(target.cores)
        if outer:
            check_splits(config, splits)
            check_outer_config(plan.problem, config, plan.family, target.best_isa)
            check_outer_queue(plan.problem, config, operands.num_experts, groups)
        else:
            check_config(plan.problem, config, plan.family, target.best_isa)
            check_queue(plan.problem, config, operands.total_rows, operands.num_experts, groups)

    def measured(config) -> None:
        check(config)
        run(plan.with_config(config, Origin.tuned, target.cores))
        if not on_torchs_stream():
            queue.wait()

    capturing = is_capturing(device)
    config = default_tuner().config_for(
        key, plan.config, lambda: trial_configs(plan, operands, _counts(rows, rows_format), target), measured, device, capturing,
        check)
    if capturing and config is plan.config:     # the tuner knows none
        return plan
    return plan.with_config(config, Origin.tuned, target.cores)


def _counts(rows: torch.Tensor, rows_format: str) -> list[Rows]:
    counts = rows.diff(prepend=rows.new_zeros(1)) if rows_format == "ends" else rows
    counts = counts.clamp(min=0)
    return counts.tolist() if counts.dim() == 1 else [tuple(of_ranks) for of_ranks in counts.T.tolist()]


def prints_configs() -> bool:
    """Whether MOE_XE_PRINT_CONFIG is set (and not to 0)."""
    return os.environ.get(PRINT_VARIABLE, "0") not in ("", "0")


def print_config(op: str, plan: LaunchPlan, operands: Operands | OuterOperands) -> None:
    """A line on stderr where configurations are printed: the call, the configuration, and who chose it."""
    if prints_configs():
        print(f"moe_xe: {op} {plan.problem}, {operands.num_experts} experts, {operands.total_rows} rows: "
              f"{plan.config} ({plan.origin.value})", file=sys.stderr, flush=True)
