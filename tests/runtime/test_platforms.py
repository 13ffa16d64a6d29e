"""A backend that fails takes no device from the others, and says what failed."""
import json
import os
import subprocess
import sys
import textwrap

import pytest

from moe_xe import runtime
from tests import broken_drivers

pytestmark = pytest.mark.cpu_device     # which the programs that are run here find

UNINITIALIZED = "level_zero backend failed with error: 37 (UR_RESULT_ERROR_UNINITIALIZED)"
REPORT = """
    import json
    import moe_xe
    from moe_xe.runtime import DeviceNotFoundError, Queue, platforms
    def message(wanted):
        try:
            return Queue.create(wanted).device.name
        except DeviceNotFoundError as error:
            return str(error)
    listed = [platforms() for _ in range(3)][-1]        # the first listing may change what the next one finds
    print(json.dumps({"platforms": [[p.name, p.backend, [facts.name for facts in p.devices], p.errors] for p in listed],
                      "kinds": [facts.kind for facts in moe_xe.devices()], "cpu": message("cpu"), "gpu": message("gpu"), "9": message(9)}))
"""
GEMM = """
    import torch, moe_xe
    a, w, counts = torch.ones(3, 5), torch.ones(2, 4, 5), torch.tensor([1, 2], dtype=torch.int32)
    assert (moe_xe.grouped_gemm(a, w, counts) == 5).all()
"""


def run(code: str, environment: dict[str, str]) -> str:
    """What a program prints; it must end well and print no error."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def report(environment: dict[str, str], first: str = "") -> dict:
    """first: code that the program runs before anything is listed."""
    return json.loads(run(textwrap.dedent(first) + textwrap.dedent(REPORT), environment))


def test_platforms_have_the_devices(queue):
    listed = runtime.platforms()
    assert queue.device.name in [facts.name for platform in listed if platform.backend == "opencl" for facts in platform.devices]
    assert {facts.name for facts in runtime.devices()} <= {facts.name for platform in listed for facts in platform.devices}


@pytest.mark.parametrize("function", ["zeDeviceGetCommandQueueGroupProperties", pytest.param("zeDeviceGetSubDevices", marks=pytest.mark.full),
                                      pytest.param("zeDeviceGetRootDevice", marks=pytest.mark.full)])
def test_level_zero_fails_when_its_devices_are_listed(queue, tmp_path, function):
    found = report(broken_drivers.level_zero(tmp_path, function), first=GEMM)
    (name, backend, devices, errors), *others = found["platforms"]
    assert backend == "level_zero" and "Level-Zero" in name and devices == [] and errors == [UNINITIALIZED]
    assert [devices for _, _, devices, errors in others if not errors] == [[queue.device.name]]
    assert found["kinds"] == ["cpu"] and found["cpu"] == queue.device.name
    for wanted in ("gpu", "9"):
        assert UNINITIALIZED in found[wanted] and name in found[wanted]
    assert "1.21.2 or newer" in found["gpu"] and "UR_LOG_LEVEL_ZERO" in found["gpu"]


@pytest.mark.few(1)
@pytest.mark.parametrize("selector, kinds", [("opencl:cpu", ["cpu"]), pytest.param("opencl:0;level_zero:0", ["cpu"], marks=pytest.mark.full), ("!opencl:*", []),
                                             ("level_zero:*;opencl:gpu", [])])
def test_a_selector_counts_while_level_zero_fails(queue, tmp_path, selector, kinds):
    found = report(broken_drivers.level_zero(tmp_path, "zeDeviceGetRootDevice") | {"ONEAPI_DEVICE_SELECTOR": selector})
    assert found["kinds"] == kinds
    assert any(errors for *_, errors in found["platforms"]) == (selector != "opencl:cpu")


@pytest.mark.parametrize("function", ["zeLoaderInit", *(pytest.param(name, marks=pytest.mark.full) for name in ("zeGetGlobalProcAddrTable", "zeDriverGetProperties"))])
def test_a_level_zero_that_sycl_skips(queue, tmp_path, function):
    found = report(broken_drivers.level_zero(tmp_path, function))
    assert found["kinds"] == ["cpu"] and [backend for _, backend, *_ in found["platforms"]] == ["opencl"]
    assert "No Intel GPU was found" in found["gpu"]


def test_a_gpu_that_is_found_but_cannot_be_used(queue, tmp_path):
    environment = broken_drivers.level_zero(tmp_path)
    found = report(environment)
    assert found["kinds"] == ["gpu", "cpu"] and found["cpu"] == queue.device.name
    assert found["gpu"].startswith("Broken GPU cannot be used: ") and UNINITIALIZED in found["gpu"] and "moe-xe doctor" in found["gpu"]
    assert run(GEMM, environment) == ""


def test_opencl_fails(tmp_path):
    """SYCL gives no platform of OpenCL then, but Level Zero's GPU stays."""
    found = report(broken_drivers.opencl(tmp_path) | {"ZEL_LIBRARY_PATH": broken_drivers.level_zero(tmp_path)["ZEL_LIBRARY_PATH"]})
    assert [devices for _, backend, devices, _ in found["platforms"] if backend == "level_zero"] == [["Broken GPU"]]
    failure = "opencl backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"
    assert failure in [error for *_, errors in found["platforms"] for error in errors]
    assert found["kinds"] == ["gpu"] and failure in found["cpu"]


def test_no_platform_at_all():
    found = report(os.environ | {"ONEAPI_DEVICE_SELECTOR": "cuda:*"})
    assert found["platforms"] == [] and found["kinds"] == [] and "failed" not in found["gpu"].replace("SYCL fails", "")
    assert "pip install 'moe_xe[cpu]'" in found["cpu"] and "pip install 'moe_xe[cpu]'" in found["9"] and "Intel GPU driver" in found["gpu"]
