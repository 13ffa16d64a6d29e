"""Every device test runs on each device that is there: the SYCL CPU device always, torch's XPU where there is one."""
import os
import re
from collections import namedtuple

import pytest
import torch

from moe_xe.ops.calls import known_calls
from moe_xe.plan.gemm.heuristics import ISA_VARIABLE
from moe_xe.runtime import cpu_isa
from moe_xe.tuning import default_tuner
from moe_xe.tuning.tuner import SECONDS_VARIABLE

# Kernels for avx512 take three times as long to compile as those for avx2, in the programs that tests run, too.
if cpu_isa() != "baseline":
    os.environ.setdefault(ISA_VARIABLE, "avx2")


def devices(config) -> list[str]:
    if config.option.device is not None:
        return ["xpu" if config.option.device == "simulated-xpu" else "cpu"]
    return ["cpu", "xpu"] if torch.xpu.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in re.findall(r"\w+", str(mark.args[0]))}
    if "device" in metafunc.fixturenames and "device" not in own:      # some mean a device of ocloc
        metafunc.parametrize("device", devices(metafunc.config), indirect=True)


@pytest.fixture(autouse=True)
def no_known_calls():
    """What a test replaces, an earlier call may have done without."""
    known_calls().clear()


@pytest.fixture
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


@pytest.fixture(scope="module")
def machines_instructions():
    """For tests of kernels that tests/kernels does not run with each instruction set."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(ISA_VARIABLE, raising=False)
        yield


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


def pytest_report_header(config):
    return f"moe_xe devices: {', '.join(devices(config))}"
