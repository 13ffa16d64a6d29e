"""The SYCL runtime and moe_xe on the simulated card."""
import json

import pytest

SYSTEM_MEMORY = {"ZESIM_SYSTEM_MEMORY": "1"}

VECTOR_ADD = r'''
import numpy as np, dpctl, dpctl.memory
from moe_xe.runtime import Kernel, Queue
theirs = dpctl.SyclQueue("level_zero:gpu", property=["in_order", "enable_profiling"])
queue = Queue.from_capsule(theirs._get_capsule())
kernel = Kernel.compile(queue, """
#include <sycl/sycl.hpp>
namespace syclex = sycl::ext::oneapi::experimental;
extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclex::nd_range_kernel<1>))
void add(const float* a, const float* b, float* c, int n) {
  const int i = sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_global_id(0);
  if (i < n) c[i] = a[i] + b[i];
}
""", "add", "pppi")
n = 1000
a, b, c = (usm(4 * n, queue=theirs) for usm in (dpctl.memory.MemoryUSMDevice, dpctl.memory.MemoryUSMShared, dpctl.memory.MemoryUSMHost))
x, y = np.random.default_rng(0).random((2, n), dtype=np.float32)
a.copy_from_host(x.view(np.uint8))
np.asarray(b).view(np.float32)[:] = y
'''

LAUNCH = '''
def launch(kernel):
    np.asarray(c)[:] = 0
    kernel.launch(queue, 8, 128, (a._pointer, b._pointer, c._pointer, n))
    queue.wait()
    return np.array_equal(np.asarray(c).view(np.float32), x + y)
'''

GROUPED_GEMM = '''
import dpctl, torch, moe_xe
from moe_xe.jit import compiler
torch.manual_seed(0)
counts = torch.tensor([30, 0, 17, 5], dtype=torch.int32)
a, w = torch.randn(52, 128, dtype=torch.{dtype}), torch.randn(4, 128, 128, dtype=torch.{dtype})
with moe_xe.on_queue(dpctl.SyclQueue("level_zero:gpu", property="in_order")):
    out = moe_xe.grouped_gemm(a, w, counts)
expected = torch.cat([x.float() @ w[e].float().T for e, x in enumerate(a.split(counts.tolist()))])
torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
print("compiled", compiler.stats().compiled, "from disk", compiler.stats().disk_hits)
'''

FUSED_MOE = '''
import dpctl, torch, moe_xe
torch.manual_seed(0)
tokens, hidden, inner, experts, k = 24, 128, 64, 4, 2
x, w13, w2 = (torch.randn(s, dtype=torch.bfloat16) / 8 for s in ((tokens, hidden), (experts, 2 * inner, hidden), (experts, hidden, inner)))
logits = torch.randn(tokens, experts)
with moe_xe.on_queue(dpctl.SyclQueue("level_zero:gpu", property="in_order")):
    weights, ids = moe_xe.route(logits, top_k=k, scoring="softmax", renormalize=True)
    out = moe_xe.fused_moe(x, w13, w2, weights, ids, activation="silu")
expected_weights, expected_ids = torch.softmax(logits, -1).topk(k)
torch.testing.assert_close(weights, expected_weights / expected_weights.sum(-1, keepdim=True))
assert torch.equal(ids.long(), expected_ids)
expected = torch.zeros(tokens, hidden)
for t in range(tokens):
    for weight, e in zip(weights[t], ids[t].long()):
        gate, up = (x[t].float() @ w13[e].float().T).chunk(2)
        expected[t] += weight * ((torch.nn.functional.silu(gate) * up) @ w2[e].float().T)
torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.002)
'''


def test_device_list(on_the_card):
    found = json.loads(on_the_card("import sys; sys.argv = ['moe-xe', 'devices', '--json']; from moe_xe.cli import app; app()"))
    card = found[0]
    assert card["kind"] == "gpu" and card["backend"] == "level_zero" and "B580" in card["name"]
    assert card["architecture"] == "intel_gpu_bmg_g21" and card["has_matrix_engine"] and card["has_fp16"]
    assert (card["xe_cores"], card["compute_units"], card["local_mem_bytes"]) == (20, 160, 128 << 10)
    assert card["sub_group_sizes"] == [16, 32] and card["global_mem_bytes"] == 12 << 30


@pytest.mark.full
def test_what_dpctl_sees(on_the_card):
    on_the_card('''
import dpctl
d, = dpctl.get_devices(backend="level_zero")
assert d.device_type == dpctl.device_type.gpu and d.vendor.startswith("Intel")
assert d.has_aspect_usm_device_allocations and d.has_aspect_usm_shared_allocations and d.has_aspect_usm_host_allocations
assert d.has_aspect_fp16 and d.has_aspect_fp64 and d.has_aspect_atomic64 and not d.has_aspect_usm_system_allocations
assert d.max_work_group_size == 1024 and d.max_mem_alloc_size > 8 << 30
import dpctl.utils
info = dpctl.utils.intel_device_info(d)
assert info["gpu_slices"] == 5 and info["gpu_subslices_per_slice"] == 4 and info["gpu_eu_count"] == 160, info
assert info["gpu_eu_count_per_subslice"] == 8 and info["gpu_hw_threads_per_eu"] == 8 and info["device_id"] == 0xE20B, info
''')


def test_vector_add_reloaded_binary_and_device_memory(on_the_card):
    """Which the host cannot touch."""
    on_the_card(VECTOR_ADD + LAUNCH + '''
assert launch(kernel)
binary = kernel.binary()
assert binary[:4] == b"\\x7fELF"
again = Kernel.from_binary(queue, binary, "add", "pppi")
assert launch(again) and again.binary() == binary
import ctypes, os
child = os.fork()
if child == 0:
    ctypes.string_at(a._pointer, 4)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11
''')


@pytest.mark.full
def test_copies_fills_and_events(on_the_card):
    on_the_card(VECTOR_ADD + '''
event = a.copy_from_device(b)
assert np.array_equal(np.frombuffer(a.copy_to_host(), np.float32), y)
first = theirs.memcpy_async(c, a, 4 * n)
second = theirs.memcpy_async(b, c, 4 * n)
second.wait()
assert first.profiling_info_submit <= first.profiling_info_start <= first.profiling_info_end <= second.profiling_info_end
''')


def test_wild_pointers_lose_the_device(on_the_card):
    printed = on_the_card(VECTOR_ADD + '''
kernel.launch(queue, 8, 128, (a._pointer, b._pointer, x.ctypes.data, n))       # host memory that is no USM
try:
    queue.wait()
except RuntimeError as error:
    print("error:", error)
import os
os._exit(0)         # the SYCL runtime does not survive the loss
''')
    assert "DEVICE LOST" in printed and "write of" in printed and "hits no buffer" in printed and "error:" in printed


@pytest.mark.parametrize("dtype, adapter", [("bfloat16", "older"), *(pytest.param(dtype, "newer", marks=pytest.mark.full) for dtype in ("bfloat16", "float16"))])
def test_grouped_gemm(dtype, adapter, on_the_card):
    """Programs elsewhere have the newer adapter of Level Zero."""
    environment = SYSTEM_MEMORY | ({"UR_LOADER_USE_LEVEL_ZERO_V2": "0"} if adapter == "older" else {})
    printed = on_the_card(GROUPED_GEMM.replace("{dtype}", dtype), **environment, MOE_XE_PRINT_CONFIG="1")
    assert "XeConfig(" in printed and "256 registers" in printed and "compiled 1 from disk 0" in printed


@pytest.mark.full
def test_second_process_starts_from_the_disk(on_the_card, tmp_path):
    program = GROUPED_GEMM.replace("{dtype}", "bfloat16")
    assert "compiled 1 from disk 0" in on_the_card(program, tmp_path, **SYSTEM_MEMORY)
    traced = on_the_card(program, tmp_path, **SYSTEM_MEMORY, ZESIM_TRACE="1")
    assert "compiled 0 from disk 1" in traced and "module of machine code" in traced and "module of SPIR-V" not in traced


@pytest.mark.full
def test_fused_moe(on_the_card):
    on_the_card(FUSED_MOE, **SYSTEM_MEMORY)
