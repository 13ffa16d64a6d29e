"""What the router computes: scores of the experts and the choice among them, as plain values."""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..problem import Dtype

MAX_EXPERTS = 1024      # a lane of a GPU's sub-group keeps a sixteenth of them in registers
MAX_TOP_K = 32
MAX_GROUPS = 32         # the chosen groups are the bits of a word

LANES = 16              # of a GPU's sub-group


class Scoring(str, Enum):
    """From logits to scores: softmax over all experts; topk_softmax, the logits themselves, with a softmax over the
    chosen ones for the weights; sigmoid; sqrtsoftplus, sqrt(log(1 + exp(x)))."""
    softmax = "softmax"
    topk_softmax = "topk_softmax"
    sigmoid = "sigmoid"
    sqrtsoftplus = "sqrtsoftplus"


class GroupScore(str, Enum):
    """A group's score: the sum of its two best experts', or its best expert's."""
    top2_sum = "top2_sum"
    max = "max"


@dataclass(frozen=True)
class RoutingProblem:
    """The top_k of num_experts for each token: all that a kernel is compiled for.

    logits, bias: types in memory; bias is added to the scores for the choice only. num_groups: equal groups of
    neighbouring experts; only those of the topk_groups best groups can be chosen. ids_bits: 32 or 64. rounded_scores: to
    the logits' type, before the bias and the choice.
    """
    num_experts: int
    top_k: int
    logits: Dtype
    scoring: Scoring = Scoring.softmax
    bias: Dtype | None = None
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = GroupScore.top2_sum
    renormalize: bool = False
    ids_bits: int = 32
    rounded_scores: bool = False


def launch_shape(tokens: int, is_cpu: bool, cores: int) -> tuple[int, int]:
    """Work-groups and their size: a sub-group for each token, or a work-item for each core of a CPU."""
    return (min(tokens, cores), 1) if is_cpu else (tokens, LANES)
