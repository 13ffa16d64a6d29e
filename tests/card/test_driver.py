"""Queues, threads, lifetimes, a lost device and the cache of binaries, under the real SYCL runtime."""
from __future__ import annotations

import pytest

from .conftest import PRELUDE, PUT, XPU


def test_queues_and_threads(on_the_card):
    """Kernels of several queues, from threads that begin together, some with the same kernel."""
    on_the_card(PRELUDE + '''
import threading
barrier, failures = threading.Barrier(4), []

def work(number):
    try:
        operands, expected = make(n=64 + 16 * (number % 2))
        barrier.wait()
        with moe_xe.on_queue(new_queue()):
            for _ in range(3):
                check(moe_xe.grouped_gemm(*operands), expected)
    except BaseException as error:
        failures.append(error)

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert not failures, failures
print(compiler.stats())
''')


@pytest.mark.full
def test_memory_that_the_card_cannot_reach_is_refused(on_the_card):
    printed = on_the_card(PRELUDE + '''
operands, expected = make()
queue = new_queue()
try:
    with moe_xe.on_queue(queue):
        moe_xe.grouped_gemm(*operands)
except ValueError as error:
    print(error)
check(moe_xe.grouped_gemm(*operands), expected)
''', ZESIM_SYSTEM_MEMORY="0")
    assert "the queue chosen with on_queue is on a gpu device, but the tensors are on cpu" in printed


def test_streams_of_torch(on_the_card):
    """Calls on two streams of torch's, each with a queue of its own."""
    on_the_card(XPU + '''
operands, expected = make(device="xpu")
first, second = torch.xpu.Stream(), torch.xpu.Stream()
assert len({torch.xpu.current_stream().sycl_queue, first.sycl_queue, second.sycl_queue}) == 3
torch.xpu.synchronize()
outs = []
for stream in (first, second, first):
    with torch.xpu.stream(stream):
        outs.append(moe_xe.grouped_gemm(*operands))
torch.xpu.synchronize()
for out in outs:
    check(out, expected)
''')


@pytest.mark.full         # test_suite.py trains one, too
def test_a_block_is_trained_on_xpu(on_the_card):
    """Forward and backward; the gradients are autograd's on the CPU."""
    on_the_card(XPU + '''
from tests.ops.block.case import make, moved, reference
block = make(dtype=torch.float32)
names = [name for name, value in block.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]

def gradients(device, compute, dtype):
    given = {name: moved(value, device) for name, value in block.items()}
    leaves = {name: given[name].to(dtype).requires_grad_() for name in names}
    out = compute(**given | leaves)
    out.square().sum().backward()
    return [out, *(leaf.grad for leaf in leaves.values())]

for name, ours, theirs in zip(["out", *names], gradients("xpu", moe_xe.fused_moe, torch.float32), gradients("cpu", reference, torch.float64)):
    assert ours.device.type == "xpu", name
    error = (ours.detach().cpu().double() - theirs.detach()).square().mean().sqrt() / theirs.detach().square().mean().sqrt()
    assert error < 1e-4, (name, error)
''')


@pytest.mark.full
def test_autotune(on_the_card):
    """Candidates are timed with the device's events; the result is right and the choice is kept."""
    printed = on_the_card(XPU + '''
operands, expected = make(device="xpu")
check(moe_xe.grouped_gemm(*operands, autotune=True), expected)
check(moe_xe.grouped_gemm(*operands, autotune=True), expected)
''', MOE_XE_PRINT_CONFIG="1", MOE_XE_TUNE_SECONDS="0")
    assert printed.count("(tuned)") == 2


@pytest.mark.full
def test_memory_goes_while_a_launch_is_pending(on_the_card):
    """Operands and scratch of calls that have returned before their kernels ran."""
    on_the_card(XPU + '''
from tests.ops.block.case import assert_close, make as make_block, moved, reference
block = make_block(dtype=torch.bfloat16)
expected = reference(**{name: moved(value, "cpu") for name, value in block.items()}).double()
outs = []
for _ in range(3):
    given = {name: moved(value, "xpu") for name, value in block.items()}
    outs.append(moe_xe.fused_moe(**given))
    del given
    junk = [torch.full((size,), 7, dtype=torch.uint8, device="xpu") for size in (1 << 10, 1 << 12, 1 << 14)]
for out in outs:
    assert_close(out.cpu(), expected, (3e-2, 1e-2))
''')


@pytest.mark.full
def test_kernels_leave_memory_while_their_launches_are_pending(on_the_card):
    on_the_card(XPU + '''
results = []
for n in (64, 80, 96):
    operands, expected = make(n=n, device="xpu")
    results.append((moe_xe.grouped_gemm(*operands), expected))
for result in results:
    check(*result)
''', MOE_XE_KERNELS="1")


@pytest.mark.full
def test_the_process_ends_with_work_pending(on_the_card):
    printed = on_the_card(XPU + '''
operands, _ = make(device="xpu")
moe_xe.grouped_gemm(*operands)
torch.xpu.synchronize()
out = moe_xe.grouped_gemm(*operands)
print("the last line")
''')
    assert printed.endswith("the last line\n")


def test_a_lost_device(on_the_card):
    """A wild pointer in somebody's kernel: our error says what happened, and the CPU device goes on."""
    printed = on_the_card(PUT + '''
operands, expected = make()
with moe_xe.on_queue(theirs):
    check(moe_xe.grouped_gemm(*operands), expected)
kernel.launch(queue, 1, 16, (64,))
for _ in range(2):
    try:
        with moe_xe.on_queue(theirs):
            moe_xe.grouped_gemm(*operands)
        raise SystemExit("no error")
    except DeviceLostError as error:
        print(error)
check(moe_xe.grouped_gemm(*operands), expected)
print("went on")
''')
    assert printed.count("the device is lost (") == 2 and "went on" in printed


@pytest.mark.full
def test_out_of_device_memory(on_the_card):
    """torch's own error, and what comes after it is right."""
    on_the_card(XPU + '''
operands, expected = make(device="xpu")
hoard = []
try:
    while len(hoard) < 7:
        hoard.append(torch.empty(2 << 30, dtype=torch.uint8, device="xpu"))
    raise SystemExit("12 GiB hold 14")
except torch.OutOfMemoryError:
    assert len(hoard) == 5, len(hoard)
check(moe_xe.grouped_gemm(*operands), expected)
''')


@pytest.mark.full
def test_a_kernel_that_does_not_fit(on_the_card):
    """More sub-groups of 256 registers than an Xe core holds: an error, no hang, and the queue goes on."""
    printed = on_the_card(PUT + '''
memory = dpctl.memory.MemoryUSMShared(4096, queue=theirs)
try:
    kernel.launch(queue, 1, 1024, (memory._pointer,))
    queue.wait()
    raise SystemExit("no error")
except RuntimeError as error:
    print("refused:", error)
kernel.launch(queue, 1, 512, (memory._pointer,))
queue.wait()
assert memory.copy_to_host()[:2048].tobytes() == b"\\1\\0\\0\\0" * 512
''')
    assert "refused:" in printed


SECOND = PRELUDE + '''
operands, expected = make()
with moe_xe.on_queue(new_queue()):
    check(moe_xe.grouped_gemm(*operands), expected)
print(compiler.stats())
'''


def test_the_cache_of_binaries(on_the_card):
    """A second process loads the binary; with another driver it is compiled anew."""
    def compiled(**environment) -> bool:
        return "compiled=1" in on_the_card(SECOND, **environment)

    assert compiled() and not compiled() and compiled(ZESIM_DRIVER_VERSION="1.14.40000")


@pytest.mark.full
def test_a_damaged_binary(on_the_card, tmp_path):
    on_the_card(SECOND)
    for path in [path for path in (tmp_path / "kernels").rglob("*") if path.is_file()]:
        path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    printed = on_the_card(SECOND)
    assert "compiled=1" in printed and "damaged entries" in printed


@pytest.mark.full
def test_a_binary_that_the_driver_refuses(on_the_card):
    """Whole on disk, but no code of this device: dropped and compiled anew."""
    on_the_card(SECOND)
    assert "compiled=1" in on_the_card('''
from moe_xe.disk_cache import DiskCache
taken = DiskCache.load
DiskCache.load = lambda self, facts: binary[:4096] if (binary := taken(self, facts)) else None
''' + SECOND)
