"""Messages of 32 lanes, contiguous blocks, 2D blocks of dwords and words; many arguments; counts by class."""
import numpy as np
import pytest

from xesim import SimError

from .building import build

rng = np.random.default_rng(8)


def K(name):
    return build("messages.cpp").kernel(name)


def test_simd32_messages():
    index = rng.permutation(100)[:32].astype("i4")
    S, D = rng.integers(-2**60, 2**60, 100), np.zeros(32, "i8")
    st = K("simd32_copy64").launch(16, 16, [S, index, D])
    assert (D == S[index] + 1).all()
    assert st.sends["load.ugm.d64.a64"] == [1, 32 * 8]         # one message, 32 lanes
    S, D = rng.integers(0, 2**31, (100, 2)).astype("i4"), np.zeros((32, 2), "i4")
    K("simd32_copy32").launch(16, 16, [S, index, D])
    assert (D == S[index]).all()


@pytest.mark.parametrize("name,dtype,n", [("block_copy32", "i4", 64), ("block_copy64", "i8", 32)])
def test_contiguous_block(name, dtype, n):
    S, D = rng.integers(1, 2**31, n).astype(dtype), np.zeros(n + 1, dtype)
    K(name).launch(16, 16, [S, D])
    assert (D[:n] == S).all() and D[n] == 0


@pytest.mark.parametrize("x0,y0", [(0, 0), (3, 20), (-5, -3), (40, 27), (100, 0)])
@pytest.mark.parametrize("name,dtype,cols", [("b2d_copy32", "i4", 16), ("b2d_array32", "i4", 16), ("b2d_copy16", "i2", 32)])
def test_block2d_of_dwords_and_words(name, dtype, cols, x0, y0):
    h, w = 32, 48
    if dtype == "i2":
        x0 &= ~1                                                # offsets are multiples of 4 bytes
    S, D = rng.integers(1, 30000, (h, w)).astype(dtype), np.full((8, cols), -1, dtype)
    st = K(name).launch(16, 16, [S, D, np.int32(w), np.int32(h), np.int32(x0), np.int32(y0)])
    P = np.zeros((h + 64, w + 256), dtype)
    P[32:32 + h, 64:64 + w] = S
    want = P[32 + y0:40 + y0, 64 + x0:64 + x0 + cols]
    if name == "b2d_array32":                                   # block by block
        want = np.concatenate([want[:, :8].reshape(4, 16), want[:, 8:].reshape(4, 16)])
    assert (D == want).all() and not st.warnings


def test_many_arguments():
    D, args, want = np.zeros((16, 28), "i8"), [], []
    for k in range(14):
        dtype = np.int64 if k % 2 else np.int32
        pointer = None if k % 3 == 2 else rng.integers(0, 1000, 16).astype(dtype)
        args += [pointer, dtype(-7 * k)]
        want += [np.full(16, -1) if pointer is None else pointer, np.full(16, -7 * k)]
    k = K("arguments")
    k.launch(16, 16, [D, *args])
    assert (D == np.stack(want, 1)).all()
    with pytest.raises(SimError, match="argument 2: .*8 bytes, the kernel's argument has 4"):
        k.launch(16, 16, [D, None, np.int64(1), *args[2:]])
    with pytest.raises(SimError, match="argument 28 is missing"):
        k.launch(16, 16, [D, *args[:-1]])


def test_null_pointer_is_not_mapped():
    with pytest.raises(SimError, match="hits no buffer"):
        K("block_copy32").launch(16, 16, [None, np.zeros(64, "i4")])


def test_counts_by_class():
    A, C = np.zeros((32, 64), "u2"), np.zeros((32, 64), "f4")
    k = build("block2d.cpp").kernel("b2d_gemm")
    st = k.launch((1, 32), (1, 32), [A, np.zeros((64, 64), "u2"), C, np.int32(32), np.int32(64), np.int32(64)])
    c = st.counts
    assert c.dpas == 2 * 2 * 16                                 # sub-groups, K steps, dpas of a step
    assert c.send == int(st.threads[:, 2].sum()) and c.sync > 0
    assert sum(c) == st.total and c.other_per_dpas == (st.total - c.dpas) / c.dpas
