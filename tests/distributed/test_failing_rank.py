"""A rank that dies or does not come: the others get the process group's error, within its timeout."""
from __future__ import annotations

import os
import time

import pytest
import torch

from moe_xe.distributed import dispatch
from tests.distributed.processes import Ranks

SECONDS = 4


def two_calls(rank, how):
    dispatch_some()
    if rank == 1:
        if how == "dies":
            os._exit(1)
        time.sleep(2 * SECONDS)
        return None
    begin = time.monotonic()
    try:
        dispatch_some()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return None


def dispatch_some():
    dispatch(torch.ones(3, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), num_experts=2, group=None)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["dies", "does not come"])
def test_others_have_the_groups_error(how):
    group = Ranks(2, SECONDS)
    try:
        message, seconds = group.outcomes(two_calls, how)[0]
    finally:
        group.stop()
    assert "closed" in message.lower() or "reset" in message.lower() or "timed out" in message.lower(), message
    assert seconds < SECONDS + 20
