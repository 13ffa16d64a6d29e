"""Indices and counts that another thread rewrites while kernels read them."""
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("rewritten.py")


def test_nothing_outside_is_touched():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=240)
    assert done.stdout == "intact\n", done.stderr
