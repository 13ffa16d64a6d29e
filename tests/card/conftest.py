"""moe_xe on the simulated card, each program in a process of its own: what only a driver can show."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zesim

REASON = zesim.missing_tools()
ROOT = Path(__file__).resolve().parents[2]

PRELUDE = '''
import dpctl, torch, moe_xe
from moe_xe.jit import compiler
from moe_xe.runtime import DeviceLostError, Kernel, Queue

def new_queue():
    return dpctl.SyclQueue("level_zero:gpu", property=["in_order"])

def make(n=64, k=64, counts=(7, 0, 13), dtype=torch.bfloat16, device="cpu"):
    a, w = torch.randn(sum(counts), k, dtype=dtype), torch.randn(len(counts), n, k, dtype=dtype)
    expected = torch.cat([x.double() @ m.double().T for x, m in zip(a.split(list(counts)), w)])
    return tuple(t.to(device) for t in (a, w, torch.tensor(counts, dtype=torch.int32))), expected

def check(out, expected):
    error = (out.cpu().double() - expected).abs().max() / expected.square().mean().sqrt()
    assert error < 2e-2, error
'''

# The same, with tensors of torch's xpu.
XPU = PRELUDE + '''
from tests.xpu import fake
fake.install()
'''


@pytest.fixture
def on_the_card(tmp_path):
    """Call it with the text of a program, which PRELUDE or XPU begins; gives what it printed."""
    if REASON:
        pytest.skip(REASON)

    def run(program: str, status: int = 0, **environment: str) -> str:
        cpu_tensors = "fake.install" not in program
        env = os.environ | zesim.environment(system_memory=cpu_tensors) | {"MOE_XE_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
        done = subprocess.run([sys.executable, "-c", program], env=env | environment, text=True, capture_output=True, timeout=300)
        printed = done.stdout + done.stderr
        assert done.returncode == status, printed
        assert "LIFETIME" not in printed        # memory freed, or a kernel destroyed, while a launch needed it
        return printed

    return run
