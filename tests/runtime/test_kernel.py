import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moe_xe.runtime import BinaryError, CompileError, Kernel

NULLS = (None, None, None, None, 0, 0, 0.0)


def test_compiled_kernel_computes(kernel, queue, check_adds):
    check_adds(kernel, queue)
    check_adds(kernel, queue, n=1)


def test_compile_error_has_the_log_and_the_name(queue):
    with pytest.raises(CompileError) as caught:
        Kernel.compile(queue, "int f() { return undeclared_name; }", "broken", "p")
    assert caught.value.kernel_name == "broken"
    assert "undeclared_name" in caught.value.log
    assert "broken" in str(caught.value) and "undeclared_name" in str(caught.value)


def test_source_without_the_kernel(queue, source):
    with pytest.raises(CompileError, match="other_name"):
        Kernel.compile(queue, source, "other_name", "p")


def test_refused_option_is_a_compile_error(queue, source):
    with pytest.raises(CompileError, match="no-such-option"):
        Kernel.compile(queue, source, "vector_add", "ppppiqf", ["--no-such-option"])


def test_unknown_signature_letter(queue, source):
    with pytest.raises(ValueError, match="'z'"):
        Kernel.compile(queue, source, "vector_add", "ppz")


@pytest.mark.parametrize("args", [(), NULLS[:-1], (*NULLS, 1)])
def test_wrong_argument_count(kernel, queue, args):
    with pytest.raises(TypeError, match=f"takes 7 arguments.*not {len(args)}"):
        kernel.launch(queue, 1, 1, args)


@pytest.mark.parametrize(
    "position, value, error",
    [(0, "text", TypeError), (0, 1.5, TypeError), (4, 2**31, OverflowError), (4, -(2**31) - 1, OverflowError),
     (4, None, TypeError), (5, 2**63, OverflowError), (6, "1", TypeError)],
)
def test_argument_that_does_not_fit(kernel, queue, position, value, error):
    args = list(NULLS)
    args[position] = value
    with pytest.raises(error):
        kernel.launch(queue, 1, 1, tuple(args))


def test_group_size_that_the_device_refuses(kernel, queue):
    with pytest.raises(RuntimeError):
        kernel.launch(queue, 1, queue.device.max_work_group_size * 2, NULLS)


def test_reloaded_binary_computes(kernel, queue, check_adds):
    # vector_add has unused arguments: none may be missing after the reload
    reloaded = Kernel.from_binary(queue, kernel.binary(), "vector_add", "ppppiqf")
    check_adds(reloaded, queue)
    assert reloaded.binary() == kernel.binary()


def test_bytes_that_are_no_binary(queue):
    with pytest.raises(BinaryError):
        Kernel.from_binary(queue, b"not a device binary", "vector_add", "ppppiqf")


def test_binary_of_another_kernel(kernel, queue):
    with pytest.raises(BinaryError, match="clCreateKernel|zeKernelCreate"):
        Kernel.from_binary(queue, kernel.binary(), "another", "p")


def test_threads_compile_at_the_same_time(queue, source, check_adds):
    def compile_one(i):
        return Kernel.compile(queue, f"{source}\n// {i}", "vector_add", "ppppiqf")

    with ThreadPoolExecutor(4) as pool:
        for kernel in pool.map(compile_one, range(4)):
            check_adds(kernel, queue)


def test_other_threads_run_while_compiling(queue, source):
    compiling = threading.Thread(target=Kernel.compile, args=(queue, source, "vector_add", "ppppiqf"))
    start = time.perf_counter()
    compiling.start()
    longest_stop, last = 0.0, start
    while compiling.is_alive():
        now = time.perf_counter()
        longest_stop, last = max(longest_stop, now - last), now
        time.sleep(0.001)
    assert longest_stop < 0.5 * (time.perf_counter() - start)


SPIN = """
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/ext/oneapi/experimental/free_function_traits.hpp>
extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::oneapi::experimental::nd_range_kernel<1>))
void spin(float* out, int rounds) {
  const int group = int(sycl::ext::oneapi::this_work_item::get_nd_item<1>().get_group(0));
  float value = out[group];
  for (int i = 0; i < rounds; ++i) value = value * 0.5f + TERM;
  out[group] = value;
}
"""


def test_a_kernel_dropped_while_it_waits_to_run_stays_until_it_has(queue):
    """What evicting kernels from memory relies on: the launch keeps code that nobody else does."""
    first, other = (Kernel.compile(queue, SPIN.replace("TERM", term), "spin", "pi").binary() for term in ("1.0f", "7.0f"))
    load = lambda binary: Kernel.from_binary(queue, binary, "spin", "pi")
    busy, out = np.zeros((2, 64), np.float32)
    load(first).launch(queue, 64, 1, (busy.ctypes.data, 3_000_000))
    load(first).launch(queue, 64, 1, (out.ctypes.data, 100))
    kernels = [load(other) for _ in range(10)]      # into memory that the dropped ones may have left
    queue.wait()
    assert (out == 2).all() and len(kernels) == 10
