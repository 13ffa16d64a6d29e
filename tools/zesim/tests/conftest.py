"""Runs each test's program in a process of its own, with the simulated card: Level Zero reads its environment once."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zesim

REASON = zesim.missing_tools()


@pytest.fixture
def on_the_card(tmp_path):
    """Call it with the text of a program; gives what it printed. kernels: moe_xe's cache folder, else an empty one."""
    if REASON:
        pytest.skip(REASON)

    def run(program: str, kernels: Path | None = None, **environment: str) -> str:
        env = os.environ | zesim.environment() | {"MOE_XE_CACHE_DIR": str(kernels or tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], env=env | environment, text=True, capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
