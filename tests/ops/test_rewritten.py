"""Indices and counts that another thread rewrites while kernels read them."""
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rewritten.py")


@pytest.mark.parametrize("what", ["sort gemms block", "sort gpu"])
def test_nothing_outside_is_touched(what):
    done = subprocess.run([sys.executable, SCRIPT, *what.split()], capture_output=True, text=True, timeout=120)
    assert done.stdout == "intact\n", done.stderr
