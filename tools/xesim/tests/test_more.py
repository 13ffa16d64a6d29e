"""SIMD32 multiplication, function calls, saturation, split barriers, CAS loops, constants."""
import os
import subprocess
import sys

import numpy as np
import pytest

import xesim
from xesim import cxx, native

from .building import build

rng = np.random.default_rng(5)


def K(name):
    return build("more.cpp").kernel(name)


def test_simd32_multiply():
    n = 1000
    a, b = rng.integers(-2**31, 2**31, (2, n)).astype("i4")
    c, d = np.zeros(n, "i4"), np.zeros(n, "u4")
    K("mul32").launch(1024, 64, [a, b, c, d, np.int32(n)])
    den = (a | 1).astype("f8")
    assert (c == (a.astype("i8") * b + np.trunc(b / den).astype("i8")).astype("i4")).all()
    assert (d == (a.view("u4").astype("u8") * b.view("u4") >> np.uint64(32)).astype("u4")).all()


def test_calls():
    n = 256
    a = rng.integers(0, 100, n).astype("i4")
    c, p, f = np.zeros(n, "i4"), rng.random(8, "f4"), np.zeros(n, "f4")
    st = K("calls").launch(n, 64, [a, c, p, f])
    F = [1, 1, 2, 6, 24, 120, 720, 5040]
    assert c.tolist() == [F[x & 7] + F[i & 3] if x & 1 else -F[i & 7] for i, x in enumerate(a.tolist())]
    want = [np.polyval(p[:3 + (i & 3)].astype("f8"), x * 0.01) for i, x in enumerate(a.tolist())]
    np.testing.assert_allclose(f, want, rtol=1e-6)
    assert st.per_op["call"] and st.per_op["ret"]


def test_saturation():
    n = 256
    a = rng.integers(-70000, 70000, n).astype("i4")
    f = (rng.random(n, "f4") * 5 - 2).astype("f4")
    b, c, g, u = np.zeros(n, "i1"), np.zeros(n, "u2"), np.zeros(n, "f4"), np.zeros(n, "u1")
    K("satur").launch(n, 64, [a, f, b, c, g, u])
    assert (b == np.clip(a.astype("i1").astype("i4") + (a >> 3).astype("i1"), -128, 127)).all()
    assert (c == np.maximum(a.astype("u2").astype("i4") - (a * 3).astype("u2"), 0)).all()
    assert (g == np.clip(f, 0, 1)).all()
    assert (u == np.clip(f * np.float32(100), 0, 255).astype("u1")).all()


@pytest.mark.parametrize("seed", range(3))
def test_split_barrier(seed):
    n, rounds = 512, 5
    a = rng.random(n, "f4")
    c = np.zeros(n, "f4")
    K("split").launch(n, 128, [a, c, np.int32(rounds)], seed=seed, quantum=3)
    v = a.reshape(-1, 128).copy()
    for _ in range(rounds):
        v = v * np.float32(0.5) + np.roll(v, -17, axis=1)
    np.testing.assert_allclose(c.reshape(-1, 128), v, rtol=1e-6)


def test_cas_loop_and_wide_atomics():
    n = 640
    lock, s, ul, mx = np.array([5], "u4"), np.zeros(1), np.zeros(1, "u8"), np.zeros(1, "f4")
    K("cas").launch(n, 64, [lock, s, ul, mx], quantum=3, max_groups=10, seed=3)
    v = 5
    for _ in range(n):
        v = (v * 1664525 + 1) & 0xFFFFFFFF
    assert lock[0] == v and s[0] == 0.25 * n * (n - 1) / 2 and ul[0] == (n - 1) << 33 and mx[0] == n - 1


def test_constants():
    """Float immediates have to come out of the disassembly exactly; a constant table in memory."""
    n = 256
    f = (rng.random(n) + 0.01).astype("f4")
    c = rng.integers(0, 100, n).astype("i4")
    f0, c0 = f.astype("f8"), c.copy()
    K("consts").launch(n, 64, [f, c])
    T = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])
    assert (c == T[(c0 * 7 + np.arange(n)) & 15]).all()
    q = lambda x: float(np.float32(x))
    want = f0 * q(3.14159274) + q(2.71828175) + np.where(f0 > q(0.333333343), q(0.1), q(-123456.789)) + 16777217. * (f0 - q(1.00000012))
    np.testing.assert_allclose(f, want, rtol=1e-6, atol=2)


def test_minmax_and_classes():
    n = 256
    a, b = (rng.standard_normal((2, n)) * 3).astype("f4")
    a[::17], b[::19], a[5::23] = np.nan, np.inf, -0.0
    c, d = np.zeros(n, "f4"), np.zeros(n, "i4")
    K("minmax").launch(n, 64, [a, b, c, d])
    with np.errstate(invalid="ignore"):
        sign = np.where(np.isnan(a), 0, np.sign(a))
        want = np.fmin(a, b) + np.fmax(a * 2, b) + np.abs(a - b) + np.copysign(a, b) + sign
        cls = (a < b) + 2 * np.isnan(a) + 4 * np.isinf(b) + 8 * (a > b) + 16 * np.signbit(a)
    np.testing.assert_allclose(c, want, rtol=1e-6, atol=1e-6)
    assert (d == cls).all()


def test_bytes():
    n = 128
    a = rng.integers(0, 256, (n, 16)).astype("u1")
    c = np.zeros(n, "u4")
    K("bytes").launch(n, 64, [a, c, np.int32(n)])
    h = np.full(n, 2166136261, "u8")
    for j in range(16):
        h = (h ^ a[:, j]) * 16777619 & 0xFFFFFFFF
    assert (c == ((h + (a.astype("u8") * np.arange(1, 17)).sum(1).astype("u8")) & 0xFFFFFFFF)).all()


def test_divisions_by_constants():
    n = 512
    a, b = rng.integers(-2**31, 2**31, n).astype("i4"), rng.integers(0, 2**32, n).astype("u4")
    s, l, o = rng.integers(-32768, 32768, n).astype("i2"), rng.integers(-2**40, 2**40, n), np.zeros(n, "i4")
    K("divs").launch(n, 64, [a, b, s, l, o])

    def tdiv(x, y):
        return np.array([abs(int(v)) // y * (1 if v >= 0 else -1) for v in x])
    A, B, S = a.astype("i8"), b.astype("i8"), s.astype("i8")
    lq = tdiv(l, 1000).astype("i4").astype("i8")
    want = tdiv(A, 7) + (A - tdiv(A, 10) * 10) + B // 3 + B % 1000 + tdiv(S, 5) + lq + (l - tdiv(l, 77) * 77)
    assert (o == want.astype("i4")).all()


def test_pointers_in_memory():
    n = 64
    mem = xesim.Memory()
    bufs = [rng.random(n, "f4") for _ in range(4)]
    table = np.array([mem.map(b) for b in bufs], "u8")
    c = np.zeros(n, "f4")
    K("ptrs").launch(n, 32, [table, c], mem=mem)
    i = np.arange(n)
    assert (c == np.stack(bufs)[i & 3, i]).all()


def test_local_memory_argument():
    a = rng.random(512, "f4")
    c = np.zeros_like(a)
    K("wgm").launch(512, 128, [a, c, xesim.Local(128 * 4)])
    assert (c.reshape(-1, 128) == a.reshape(-1, 128)[:, ::-1]).all()


def test_statistics(tmp_path):
    a, b, n = np.zeros(256, "i4"), np.zeros(256, "i4"), 256
    a[:] = 3
    st = K("bytes").launch(128, 64, [np.zeros(2048, "u1"), np.zeros(128, "u4"), np.int32(n)])
    d = st.as_dict()
    assert d["instructions"] == sum(d["per_op"].values()) == int(st.threads[:, 0].sum()) and d["threads"] == 8
    assert d["send_class"]["store"] == {"count": 8, "bytes": 512}
    st.csv(tmp_path / "s.csv"), st.threads_csv(tmp_path / "t.csv"), st.json(tmp_path / "s.json")
    assert (tmp_path / "s.csv").read_text().startswith("what,name,count,bytes\nop,")
    assert "send.ugm" in st.profile()


@pytest.mark.full
def test_static_command():
    r = subprocess.run([sys.executable, "-m", "xesim", "static", str(build("jm.cpp").dump.folder), "jm_bf16_32x32"],
                       env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))), capture_output=True, text=True, check=True).stdout
    assert "jm_bf16_32x32: GRF 128" in r and "loop at offsets" in r and "dpas 8" in r


def test_too_large_work_group():
    k = build("jm.cpp", "-ze-intel-256-GRF-per-thread").kernel("jm_bf16_8x16")
    with pytest.raises(xesim.SimError, match="sub-groups in a work-group"):
        k.launch((1, 1024), (1, 1024), [0, 0, 0, np.int32(1), np.int32(1)])


@pytest.mark.parametrize("text,why", [("        frob (16|M0)  r1.0<1>:d  r2.0<1;1,0>:d", "unknown mnemonic"),
                                      ("        mov (16|M0)  r1.0<1>:zz  r2.0<1;1,0>:d", "type"),
                                      ("        mov (16|M0)  r1.0<1>:d", "operand count"), ("L32:", "label offset")])
def test_unknown_text_fails_loudly(text, why):
    from xesim.native import lib
    p = lib().xs_prog_new()
    assert lib().xs_prog_parse(p, ("L0:\n" + text + "\n").encode(), 0) == -1
    assert why in lib().xs_error().decode()
    lib().xs_prog_free(p)


def test_a_library_of_others_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "xesim").mkdir()
    (tmp_path / "xesim").chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        cxx.build("libxesim.so", native.SOURCES, native.HEADERS)
