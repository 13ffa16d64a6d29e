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

# With a queue, and a kernel of 256 registers that writes where it is told to.
PUT = PRELUDE + '''
import dpctl.memory
theirs = new_queue()
queue = Queue.from_capsule(theirs._get_capsule())
kernel = Kernel.compile(queue, """
#include <sycl/sycl.hpp>
#include <sycl/ext/intel/experimental/grf_size_properties.hpp>
namespace syclex = sycl::ext::oneapi::experimental;
extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclex::nd_range_kernel<1>)) SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclex::sub_group_size<16>))
SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::intel::experimental::grf_size<256>))
void put(int* p) { p[sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_global_id(0)] = 1; }
""", "put", "p")
'''

# As PRELUDE, with tensors of torch's xpu.
XPU = PRELUDE + '''
from tests.xpu import fake
fake.install()
'''


@pytest.fixture
def on_the_card(tmp_path):
    """Call it with the text of a program, which PRELUDE, PUT or XPU begins; gives what it printed."""
    if REASON:
        pytest.skip(REASON)

    def run(program: str, **environment: str) -> str:
        cpu_tensors = "fake.install" not in program
        env = os.environ | zesim.environment(system_memory=cpu_tensors) | {"MOE_XE_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"}
        done = subprocess.run([sys.executable, "-c", program], env=env | environment, text=True, capture_output=True, timeout=300)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
        assert "LIFETIME" not in printed        # memory freed, or a kernel destroyed, while a launch needed it
        return printed

    return run
