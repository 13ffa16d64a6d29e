"""Routing problem -> the text that the run-time compiler gets."""
from __future__ import annotations

import functools
from enum import Enum

from ..plan.block.routing import GroupScore, RoutingProblem, Scoring
from .kernel_source import KernelSource
from .source import assemble

KERNEL_NAME = "route"
# logits correction_bias topk_weights topk_ids, tokens, logits_stride, scaling_factor
KERNEL_SIGNATURE = "pppp" + "qq" + "f"


@functools.lru_cache(maxsize=1024)
def route_source(problem: RoutingProblem, isa: str | None) -> KernelSource:
    """The kernel for this problem; isa: the CPU device's vector instructions, None for a GPU."""
    return KernelSource(KERNEL_NAME, KERNEL_SIGNATURE, generate(problem, isa))


def generate(problem: RoutingProblem, isa: str | None) -> str:
    """C++ text of the router for this problem."""
    return assemble("CPU" if isa else "GENERIC", [
        _enum_class(Scoring), _enum_class(GroupScore),
        f"inline constexpr int num_experts = {problem.num_experts}, top_k = {problem.top_k};",
        f"inline constexpr int num_groups = {problem.num_groups}, topk_groups = {problem.topk_groups};",
        f"inline constexpr Dtype input = Dtype::{problem.logits.value}, output = Dtype::f32, "
        f"bias = Dtype::{(problem.bias or problem.logits).value};",
        f"inline constexpr Scoring scoring = Scoring::{problem.scoring.value};",
        f"inline constexpr GroupScore group_score = GroupScore::{problem.group_score.value};",
        f"inline constexpr bool has_bias = {str(problem.bias is not None).lower()}, "
        f"renormalize = {str(problem.renormalize).lower()}, rounded_scores = {str(problem.rounded_scores).lower()};",
        f"using ExpertId = int{problem.ids_bits};",
    ], [f"inline constexpr Isa isa = Isa::{isa};"] if isa else [], "route.cpp")


def _enum_class(enum: type[Enum]) -> str:
    return f"enum class {enum.__name__} {{ {', '.join(member.value for member in enum)} }};"
