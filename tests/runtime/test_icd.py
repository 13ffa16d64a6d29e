import os
import subprocess
import sys
import textwrap

import pytest

from moe_xe import _icd

VARIABLE = "OCL_ICD_FILENAMES"


@pytest.fixture
def driver():
    path = _icd.find_cpu_driver()
    if path is None:
        pytest.skip("intel-opencl-rt is not installed")
    return str(path)


def run(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | variables
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("first", [pytest.param("pass", marks=pytest.mark.full), "import torch, dpctl"])
def test_cpu_device_is_found_whoever_is_imported_first(driver, first):
    done = run(f"""
        {first}
        from moe_xe.runtime import Queue
        print(Queue.create("cpu").device.kind)
    """)
    assert done.stdout.strip() == "cpu", done.stderr


def test_keeps_what_the_user_set(monkeypatch, driver):
    monkeypatch.setenv(VARIABLE, "/opt/other.so")
    _icd.announce_cpu_driver()
    _icd.announce_cpu_driver()
    assert os.environ[VARIABLE] == f"/opt/other.so:{driver}"


def test_leaves_the_environment_alone_without_a_driver(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(_icd, "find_cpu_driver", lambda: None)
    _icd.announce_cpu_driver()
    assert VARIABLE not in os.environ


def test_extension_that_cannot_be_loaded_is_explained():
    advice = {"libsycl.so.9: cannot open shared object file": "pip install 'intel-sycl-rt", "No module named 'moe_xe._runtime'": "not built"}
    done = run(f"""
        import sys
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "moe_xe._runtime":
                    raise ImportError(failure)
        sys.meta_path.insert(0, Broken())
        for failure in {list(advice)}:
            try:
                import moe_xe.runtime
            except ImportError as error:
                print(error)
    """)
    for (failure, said), line in zip(advice.items(), done.stdout.splitlines(), strict=True):
        assert failure in line and said in line, done.stderr
