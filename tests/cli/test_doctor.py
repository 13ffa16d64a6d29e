"""moe-xe doctor: what it says of devices that compute, fail, crash and hang."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zesim
from moe_xe import __version__
from moe_xe.doctor import environment, probe, report, separately
from moe_xe.runtime import devices
from tests import broken_drivers

CPU = devices()[-1].name
ROOT = Path(__file__).parents[2]


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "moe_xe.cli", "doctor", *arguments], env=env, capture_output=True, text=True, timeout=800)


def shown(done: subprocess.CompletedProcess) -> dict[str, str]:
    """The text of each section, its lines joined."""
    assert max(map(len, done.stdout.splitlines())) <= 80, done.stdout
    found = {}
    for section in done.stdout.strip().split("\n\n"):
        title, *lines = section.splitlines()
        found[title] = " ".join(" ".join(lines).split())
    return found


@pytest.fixture(scope="module")
def facts():
    done = run("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.full
def test_report_as_json(facts):
    sections = {section["title"]: section["facts"] for section in facts["sections"]}
    assert facts["computed"] and sections["versions"]["moe_xe"].startswith(__version__)
    assert {"Python", "torch", "intel-sycl-rt", "intel-cmplr-lib-ur", "intel-opencl-rt", "dpctl", "libsycl", "UR adapters", "ocloc"} <= set(sections["versions"])
    assert "libur_adapter_opencl" in sections["versions"]["UR adapters"] and Path(sections["versions"]["libsycl"]).exists()
    assert sections["environment"]["OCL_ICD_FILENAMES"] and "usable" in sections["cache"]["folder"]
    assert CPU in [device["name"] for platform in sections["platforms"]["platforms"] for device in platform["devices"]]
    gemm = sections[f"grouped GEMM on {CPU}"]
    assert gemm["correct"] and 0 < gemm["max_error"] < 0.05 and gemm["first_ms"] > gemm["later_ms"] > 0


needs_card = pytest.mark.skipif(bool(zesim.missing_tools()), reason=zesim.missing_tools() or "-")
XPU = """
from tests.xpu import fake
fake.install()
from moe_xe.doctor import probe
print(probe.main(["gemm", "0"]))
"""


@pytest.mark.full
@needs_card
def test_torchs_xpu_computes():
    env = os.environ | zesim.environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
    done = subprocess.run([sys.executable, "-c", XPU], env=env, capture_output=True, text=True, timeout=600)
    assert "'memory': \"torch's, on xpu\", 'correct': True" in done.stdout, done.stdout + done.stderr


@needs_card
def test_a_simulated_gpu_computes():
    done = run(env=os.environ | zesim.environment())
    found = {title: text for title, text in shown(done).items() if "B580" in title}
    (gemm,) = found.values()
    assert done.returncode == 0 and gemm.startswith("right ") and ("torch's, on xpu" if getattr(torch.version, "xpu", None) else "dpctl's, shared USM") in gemm


def test_a_gpu_without_torch_and_dpctl(monkeypatch):
    monkeypatch.setitem(sys.modules, "dpctl", None)
    with pytest.raises(probe._NotRun, match="install an XPU build of torch, or dpctl"):
        probe._with_dpctl(None, 0, None, None, None)
    assert report._gemm_rows({"not_run": "why"}) == [("not run", "why")]


@pytest.mark.full
def test_a_level_zero_that_fails(tmp_path):
    """The report says so, and goes on with the CPU."""
    done = run(env=broken_drivers.level_zero(tmp_path, "zeDeviceGetSubDevices"))
    found = shown(done)
    assert done.returncode == 0 and f"grouped GEMM on {CPU}" in found
    assert str(tmp_path) in found["Level Zero loader"].replace(" ", "") and "1.32.0" in found["Level Zero loader"]
    assert "- error level_zero backend failed with error: 37 (UR_RESULT_ERROR_UNINITIALIZED)" in found["platforms"]
    assert f"- cpu {CPU}" in found["platforms"]


@pytest.mark.full
def test_a_gpu_that_fails_beside_a_cpu(tmp_path):
    done = run(env=broken_drivers.level_zero(tmp_path))
    found = shown(done)
    assert done.returncode == 0
    assert found["grouped GEMM on Broken GPU"].startswith("FAILED DeviceNotFoundError: Broken GPU cannot be used: level_zero backend failed")
    assert found[f"grouped GEMM on {CPU}"].startswith("right ")


@pytest.mark.full
def test_a_driver_that_crashes_sycl(tmp_path):
    """The SYCL runtime of 2026.1 does not survive this failure, so each backend is tried alone."""
    done = run(env=broken_drivers.level_zero(tmp_path, "zeDeviceGet"))
    found = shown(done)
    assert done.returncode == 0
    for title in ("platforms", "platforms with ONEAPI_DEVICE_SELECTOR=level_zero:*"):
        assert found[title].startswith("error killed by signal 11") and "UR_RESULT_ERROR_UNINITIALIZED" in found[title]
    assert f"- cpu {CPU}" in found["platforms with ONEAPI_DEVICE_SELECTOR=opencl:*"]
    assert found[f"grouped GEMM on {CPU}"].startswith("right ")


@pytest.mark.full
def test_no_device():
    done = run(env=os.environ | {"ONEAPI_DEVICE_SELECTOR": "cuda:*"})
    assert done.returncode == 1 and done.stdout.endswith("no device computed right\n")
    assert "ONEAPI_DEVICE_SELECTOR cuda:*" in shown(done)["environment"] and "SYCL finds no device" in shown(done)["platforms"]


def test_a_program_that_hangs_ends():
    assert separately.run("platforms", seconds=0.1) == {"error": "no answer in 0.1 s, killed"}


def test_a_program_that_raises():
    found = separately.run("gemm", "99", seconds=100)
    assert found["error"].startswith("IndexError")


def test_wrong_results_are_no_success(monkeypatch):
    wrong = {"correct": False, "max_error": 1.0, "calc_diff": 1.0, "memory": "torch's", "first_ms": 1.0, "later_ms": 1.0}
    answers = {"gemm": wrong, "platforms": {"platforms": [], "devices": [{"name": "A"}]}, "loader": {"path": "p", "version": "1.8.0"}}
    monkeypatch.setattr(separately, "run", lambda what, *_, **__: answers[what])
    found = {section.title: section for section in report.sections(1)}
    assert found["grouped GEMM on A"].rows[0][0] == "WRONG" and not any(section.computed for section in found.values())
    assert "older than 1.21.2" in dict(found["Level Zero loader"].rows)["advice"]


@pytest.mark.parametrize("version, old", [("1.8.0", True), ("1.21.1", True), ("1.21.2", False), ("1.32.0", False), ("", False)])
def test_old_loaders(version, old):
    assert report._is_old(version) == old


def test_render_nodes(tmp_path):
    assert "no render node" in environment._cards(tmp_path, tmp_path)[str(tmp_path)]
    node, device = tmp_path / "renderD128", tmp_path / "renderD128" / "device"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x8086\n")
    (device / "device").write_text("0xe20b\n")
    (device / "driver").symlink_to("/nowhere/xe")
    assert environment._cards(tmp_path, tmp_path) == {str(node): "8086:e20b, driver xe, accessible"}


def test_a_render_node_without_access(tmp_path, monkeypatch):
    (tmp_path / "renderD128").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"NOT accessible: add the user to the group that owns it ({(tmp_path / 'renderD128').group()})" in \
        environment._cards(tmp_path, tmp_path)[str(tmp_path / "renderD128")]


def test_a_cache_that_is_not_usable(tmp_path, monkeypatch):
    tmp_path.chmod(0o777)
    (tmp_path / "kernels").mkdir(mode=0o700)
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    assert environment.cache()["folder"].startswith("NOT usable: ")


def test_only_what_matters_of_the_environment(monkeypatch):
    monkeypatch.setenv("SYCL_CACHE_PERSISTENT", "1")
    monkeypatch.setenv("MY_TOKEN", "secret")
    found = environment.variables()
    assert found["SYCL_CACHE_PERSISTENT"] == "1" and "secret" not in found.values()
