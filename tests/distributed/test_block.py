"""expert_parallel_moe on several ranks is the block of one process, and so are its gradients."""
from __future__ import annotations

import pytest
import torch

from tests.distributed.case import block, check
from tests.distributed.processes import ranks

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_equals_one_process(dtype):
    """Tokens and experts are spread unevenly."""
    tokens, experts = (9, 0, 17, 5), (3, 1, 2, 1)
    check(ranks(4), block(tokens, experts, dtype=dtype), tokens, experts)
