"""Launches that are made again on other memory."""
import numpy as np
import pytest

from moe_xe.runtime import LaunchSequence

N = 1000
BYTES = 4 * N


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng().random(shape, dtype=np.float32)


def addresses(*arrays) -> tuple[int, ...]:
    return tuple(0 if array is None else array.ctypes.data for array in arrays)


@pytest.fixture
def twice(kernel):
    return make_twice(kernel)


def make_twice(kernel, zeroed_bytes: int = 8) -> LaunchSequence:
    """memory[2:] = a + 2 b, then a = a + 3 memory[:-2]; the buffers are a, b and memory, which begins with two zeros."""
    sequence = LaunchSequence([(BYTES, True, 0), (BYTES, False, 0), (BYTES + 8, True, zeroed_bytes)])
    sequence.add(kernel, -(-N // 64), 64, (None, 1, 1, 1, N, 7, 2.0), [(1, 0, 0), (2, 1, 0), (3, 2, 8)])
    sequence.add(kernel, -(-N // 64), 64, (None, 1, 1, 1, N, 7, 3.0), [(1, 0, 0), (2, 2, 0), (3, 0, 0)])
    return sequence


@pytest.mark.parametrize("on_host", [True, False])
def test_on_other_memory(kernel, queue, on_host):
    sequence = make_twice(kernel, 8 if on_host else 0)      # a queue fills USM only
    for _ in range(3):
        (a, b), out = values(2, N), np.full(N + 2, np.nan, dtype=np.float32)
        if not on_host:
            out[:2] = 0
        before = a.copy()
        assert sequence.run(queue, addresses(a, b, out), on_host)
        if not on_host:
            queue.wait()
        np.testing.assert_allclose(out[2:], before + 2 * b, rtol=1e-6)
        assert (out[:2] == 0).all()
        np.testing.assert_allclose(a, before + 3 * out[:N], rtol=1e-5)


@pytest.mark.parametrize("wrong", ["null", "the same", "one byte", "inside"])
def test_memory_that_is_not_taken(wrong, twice, queue):
    a, b, out = values(N), values(N), values(N + 2)
    place = {"null": 0, "the same": a.ctypes.data, "one byte": a.ctypes.data + BYTES - 1, "inside": out.ctypes.data + 8}[wrong]
    kept = [array.copy() for array in (a, b, out)]
    assert not twice.run(queue, (a.ctypes.data, place, out.ctypes.data), True)
    assert all((array == copy).all() for array, copy in zip((a, b, out), kept))


def test_neighbours_and_what_is_only_read(kernel, queue):
    memory = values(3 * N)
    a, b, out = memory.reshape(3, N)
    sequence = LaunchSequence([(BYTES, False, 0), (BYTES, False, 0), (BYTES, True, 0), (0, True, 0)])
    sequence.add(kernel, -(-N // 64), 64, (None, 1, 1, 1, N, 7, 2.0), [(1, 0, 0), (2, 1, 0), (3, 2, 0)])
    assert sequence.run(queue, addresses(a, b, out, None), True)
    np.testing.assert_allclose(out, a + 2 * b, rtol=1e-6)
    assert sequence.run(queue, addresses(a, a, out, a), True)
    np.testing.assert_allclose(out, 3 * a, rtol=1e-6)


def test_wrong_numbers(twice, kernel, queue):
    with pytest.raises(ValueError, match="of 3 buffers were given 2 addresses"):
        twice.run(queue, (1, 2), True)
    with pytest.raises(TypeError, match="at most 64 buffers"):
        twice.run(queue, (1,) * 65, True)
    with pytest.raises(TypeError):
        twice.run(queue, ("a", 1, 1), True)
    for pointer in ((1, 3, 0), (7, 0, 0)):
        with pytest.raises(ValueError, match="vector_add has no such buffer or argument"):
            twice.add(kernel, 1, 64, (None, 1, 1, 1, N, 7, 2.0), [pointer])
    with pytest.raises(TypeError, match="takes 7 arguments"):
        twice.add(kernel, 1, 64, (None,), [])


def test_a_launch_that_fails(kernel, queue):
    """What was submitted before it has ended when the error arrives."""
    (a, b), out = values(2, N), np.full(N, np.nan, dtype=np.float32)
    sequence = LaunchSequence([(BYTES, False, 0), (BYTES, False, 0), (BYTES, True, 0)])
    pointers = [(1, 0, 0), (2, 1, 0), (3, 2, 0)]
    sequence.add(kernel, -(-N // 64), 64, (None, 1, 1, 1, N, 7, 2.0), pointers)
    sequence.add(kernel, 1, queue.device.max_work_group_size * 2, (None, 1, 1, 1, N, 7, 2.0), pointers)
    with pytest.raises(RuntimeError):
        sequence.run(queue, addresses(a, b, out), True)
    np.testing.assert_allclose(out, a + 2 * b, rtol=1e-6)
