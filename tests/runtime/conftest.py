from pathlib import Path

import numpy as np
import pytest

from moe_xe.runtime import DeviceNotFoundError, Kernel, Queue


@pytest.fixture(scope="session")
def kind(pytestconfig) -> str:
    """Of the device under test, as SYCL and dpctl call it."""
    return "cpu" if pytestconfig.option.device is None else "gpu"


@pytest.fixture(scope="session")
def queue(kind):
    try:
        return Queue.create(kind)
    except DeviceNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def source():
    return (Path(__file__).parent / "vector_add.cpp").read_text()


@pytest.fixture(scope="session")
def kernel(queue, source):
    return Kernel.compile(queue, source, "vector_add", "ppppiqf")


@pytest.fixture
def check_adds():
    """Runs a vector_add kernel and compares with numpy."""

    def check(kernel, queue, n=1000):
        a, b = np.random.default_rng(0).random((2, n), dtype=np.float32)
        out = np.full(n + 64, -1, dtype=np.float32)
        args = (None, a.ctypes.data, b.ctypes.data, out.ctypes.data, n, 7, 2.5)
        kernel.launch(queue, -(-n // 64), 64, args)
        queue.wait()
        np.testing.assert_allclose(out[:n], a + np.float32(2.5) * b, rtol=1e-6)
        assert (out[n:] == -1).all()

    return check
