from pathlib import Path

import numpy as np
import pytest

from moe_xe.jit import KernelSource
from moe_xe.runtime import DeviceNotFoundError, Queue

VECTOR_ADD = Path(__file__).resolve().parents[1] / "runtime" / "vector_add.cpp"


@pytest.fixture(scope="session")
def queue():
    try:
        return Queue.create("cpu")
    except DeviceNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vector_add():
    """With a shipped header, so that the compiler must find the include folder."""
    return KernelSource("vector_add", "ppppiqf", "#include <moe_xe/types.hpp>\n" + VECTOR_ADD.read_text())


@pytest.fixture
def check_adds(queue):
    def check(kernel):
        a = np.arange(8, dtype=np.float32)
        out = np.zeros_like(a)
        kernel.launch(queue, 8, 1, (None, a.ctypes.data, a.ctypes.data, out.ctypes.data, 8, 0, 2.0))
        queue.wait()
        np.testing.assert_array_equal(out, 3 * a)

    return check
