"""A sample of the suite on the simulated card; make test-all runs the whole."""
from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from .conftest import REASON, ROOT

FILES = ("tests/ops/gemm/test_grouped_gemm.py", "tests/ops/routing/test_token_sort.py", "tests/ops/block/test_fused_moe.py",
         "tests/ops/block/test_fused_moe_training.py", "tests/runtime/test_device.py")


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("option, names", [
    pytest.param("simulated", "test_gathered_rows or test_scattered_and_scaled_rows or test_public_functions or test_facts", marks=pytest.mark.full),
    ("simulated-xpu", "test_gathered_rows or test_scattered_and_scaled_rows or test_gradients_lie")])
def test_a_sample(option, names):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "--device", option, "-k", names, *FILES], cwd=ROOT, env=environment,
                          text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 4 and "skipped" not in done.stdout.splitlines()[-1], done.stdout
