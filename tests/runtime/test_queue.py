import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap

import dpctl
import pytest

from moe_xe.runtime import AsyncError, Queue


def test_shares_the_queue_at_an_address(queue, kernel, check_adds):
    shared = Queue.from_address(queue.address)
    assert (shared.context_id, shared.device_id) == (queue.context_id, queue.device_id)
    check_adds(kernel, shared)


def test_shares_a_dpctl_queue_that_outlives_it(kernel, queue, kind, check_adds):
    theirs = dpctl.SyclQueue(kind, property="in_order")
    by_capsule = Queue.from_capsule(theirs._get_capsule())
    by_address = Queue.from_address(theirs.addressof_ref())
    del theirs
    for shared in (by_capsule, by_address):
        assert shared.context_id == queue.context_id  # so one compiled kernel serves both
        check_adds(kernel, shared)


def test_refuses_an_out_of_order_queue(kind):
    with pytest.raises(ValueError, match="in-order"):
        Queue.from_capsule(dpctl.SyclQueue(kind)._get_capsule())


def test_refuses_another_capsule(kind):
    with pytest.raises(ValueError, match="SyclQueueRef"):
        Queue.from_capsule(dpctl.SyclContext(kind)._get_capsule())


def test_refuses_address_zero():
    with pytest.raises(ValueError):
        Queue.from_address(0)


def test_device_by_kind_and_index(queue):
    with pytest.raises(ValueError, match="tpu"):
        Queue.create("tpu")
    with pytest.raises(RuntimeError, match="no SYCL device 1000"):
        Queue.create(1000)


@pytest.mark.full      # tests/runtime/test_platforms.py has the same errors in one process
@pytest.mark.parametrize("wanted, advice", [("'cpu'", "pip install 'moe_xe[cpu]'"), ("'gpu'", "Intel GPU driver"),
                                            ("0", "pip install 'moe_xe[cpu]'")])
def test_without_devices_the_error_says_what_to_install(wanted, advice):
    code = f"""
        from moe_xe.runtime import DeviceNotFoundError, Queue, devices
        assert devices() == []
        try:
            Queue.create({wanted})
        except DeviceNotFoundError as error:
            print(error)
    """
    hidden = os.environ | {"ONEAPI_DEVICE_SELECTOR": "cuda:*"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=hidden, capture_output=True, text=True)
    assert advice in done.stdout, done.stderr


FAILING_HOST_TASK = """
#include <sycl/sycl.hpp>
extern "C" void submit_failing_host_task(sycl::queue* queue) {
    queue->submit([](sycl::handler& handler) {
        handler.host_task([] { throw std::runtime_error("failed on purpose"); });
    });
}
"""


def test_asynchronous_error_surfaces_once_at_wait(kind, kernel, check_adds, tmp_path):
    compiler, prefix = shutil.which("g++"), sysconfig.get_path("data")
    if not compiler or not os.path.exists(f"{prefix}/include/sycl/sycl.hpp"):
        pytest.skip("needs g++ and the SYCL headers")
    (tmp_path / "task.cpp").write_text(FAILING_HOST_TASK)
    subprocess.run([compiler, "-std=c++17", "-w", "-shared", "-fPIC", f"-I{prefix}/include", "task.cpp", "-o", "task.so",
                    f"-L{prefix}/lib", "-lsycl", f"-Wl,-rpath,{prefix}/lib"], cwd=tmp_path, check=True)
    own = Queue.create(kind)
    ctypes.CDLL(str(tmp_path / "task.so")).submit_failing_host_task(ctypes.c_void_p(own.address))
    with pytest.raises(AsyncError, match="failed on purpose"):
        own.wait()
    own.wait()
    check_adds(kernel, own)
