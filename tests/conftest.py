"""Every device test runs on each device that is there: the SYCL CPU device always, torch's XPU where there is one."""
import importlib
import re
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from moe_xe.tuning import default_tuner
from moe_xe.tuning.tuner import SECONDS_VARIABLE

DEVICES = ["cpu"] + (["xpu"] if torch.xpu.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def fresh_tuner(tmp_path, monkeypatch):
    """autotune=True that knows nothing yet, measures as shortly as it can and keeps its choices below tmp_path."""
    default_tuner.cache_clear()
    with monkeypatch.context() as environment:      # kernels stay in the cache of all tests
        environment.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
        environment.setenv(SECONDS_VARIABLE, "0")
        tuner = default_tuner()
    yield tuner
    default_tuner.cache_clear()


_ASK_FOR_TARGETS = [f"moe_xe.ops.{name}" for name in ("block.activate", "gemm.grouped_outer", "launch", "routing.route", "routing.token_sort")]


@pytest.fixture
def quickly_compiled(monkeypatch):
    """For tests that are not about kernels: those for avx512 take three times as long to compile as those for avx2. tests/kernels
    has all instruction sets, and the operators' own tests those of the machine."""
    target_of = importlib.import_module("moe_xe.ops.launch").target_of

    def narrow(facts):
        target = target_of(facts)
        return replace(target, isa="avx2") if (target.isa or "").startswith("avx") else target

    for name in _ASK_FOR_TARGETS:
        monkeypatch.setattr(importlib.import_module(name), "target_of", narrow)


Launched = namedtuple("Launched", "op problem experts rows config origin")


@pytest.fixture
def launched(monkeypatch, capsys):
    """Call it for what was launched since the last call, as MOE_XE_PRINT_CONFIG says it."""
    monkeypatch.setenv("MOE_XE_PRINT_CONFIG", "1")

    def lines() -> list[Launched]:
        printed = capsys.readouterr().err.splitlines()
        return [Launched(*re.fullmatch(r"moe_xe: (\w+) (.+), (\d+) experts, (\d+) rows: (.+) \((\w+)\)", line).groups())
                for line in printed if line.startswith("moe_xe: ")]

    return lines


def pytest_report_header():
    return f"moe_xe devices: {', '.join(DEVICES)}"
