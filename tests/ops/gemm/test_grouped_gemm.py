import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moe_xe
from moe_xe import runtime
from moe_xe.bench.numerics import agrees, difference, reference_grouped_gemm
from moe_xe.plan.gemm.heuristics import ISA_VARIABLE, generic_config
from moe_xe.plan.override import force_config
from moe_xe.plan.model.schedule import tiles

from ..threads import assert_threads_agree
from ..tiles import K, N

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = [0, 5, 300, 1, 64, 0, 17]


def make(counts, n, k, dtype, device, bias=None):
    a = torch.randn(sum(counts), k, dtype=dtype, device=device)
    w = torch.randn(len(counts), n, k, dtype=dtype, device=device)
    rows = torch.tensor(counts, dtype=torch.int32, device=device)
    return a, w, rows, None if bias is None else torch.randn(len(counts), n, dtype=bias, device=device)


def poisoned(rows, n, dtype, device):
    return torch.full((rows, n), float("nan"), dtype=dtype, device=device)


def assert_right(out, a, w, counts, bias=None):
    reference = reference_grouped_gemm(a, w, counts, bias)
    assert agrees(out, reference, a.shape[1]), difference(out, reference)


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_matches_the_reference(dtype, layout, bias, device, monkeypatch):
    """With the machine's own instructions."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    a, w, rows, b = make(COUNTS, 203, 141, dtype, device, bias)
    out = poisoned(sum(COUNTS), 203, dtype, device)
    given_w = w if layout == "enk" else w.transpose(1, 2).contiguous()
    assert moe_xe.grouped_gemm(a, given_w, rows, bias=b, weight_layout=layout, out=out) is out
    assert_right(out, a, w, COUNTS, b)


@settings(settings.get_profile("compiling"), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=20),
       n=st.integers(1, 150), k=st.integers(1, 150), dtype=st.sampled_from(DTYPES))
def test_any_shape(counts, n, k, dtype):
    a, w, rows, _ = make(counts, n, k, dtype, "cpu")
    assert_right(moe_xe.grouped_gemm(a, w, rows, check=True), a, w, counts)


@pytest.mark.few(2)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_output_dtype(out_dtype, device):
    a, w, rows, _ = make(COUNTS, N, K, torch.bfloat16, device)
    out = moe_xe.grouped_gemm(a, w, rows, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_right(out, a, w, COUNTS)


def test_512_experts_and_int64_counts(device):
    counts = [(7 * e) % 5 for e in range(512)]
    a, w, rows, _ = make(counts, N, K, torch.bfloat16, device)
    assert_right(moe_xe.grouped_gemm(a, w, rows.long()), a, w, counts)


@pytest.mark.parametrize("layout", ["enk", pytest.param("ekn", marks=pytest.mark.full)])
def test_gathered_rows(layout, device):
    a, w, rows, _ = make(COUNTS, N, K, torch.bfloat16, device)
    tokens = a[:50].contiguous()
    indices = torch.randint(0, 50, (sum(COUNTS),), dtype=torch.int32, device=device)
    given_w = w if layout == "enk" else w.transpose(1, 2).contiguous()
    out = moe_xe.grouped_gemm(tokens, given_w, rows, gather_indices=indices, weight_layout=layout, check=True)
    assert_right(out, tokens[indices.long()], w, COUNTS)


@pytest.mark.parametrize("layout", [pytest.param("enk", marks=pytest.mark.full), "ekn"])
def test_scattered_and_scaled_rows(layout, device):
    a, w, rows, b = make(COUNTS, N, K, torch.bfloat16, device, torch.float32)
    total = sum(COUNTS)
    indices, scales = torch.randperm(total, device=device).int(), torch.rand(total, device=device)
    given_w = w if layout == "enk" else w.transpose(1, 2).contiguous()
    out = moe_xe.grouped_gemm(a, given_w, rows, bias=b, scatter_indices=indices, row_scales=scales, weight_layout=layout,
                              out=poisoned(total, N, torch.bfloat16, device), check=True)
    reference = reference_grouped_gemm(a, w, COUNTS, b) * scales[:, None]
    assert agrees(out[indices.long()], reference, K)


@pytest.mark.full
def test_gather_divisor(device):
    a, w, rows, _ = make(COUNTS, N, K, torch.float32, device)
    pairs = torch.randint(0, 3 * 50, (sum(COUNTS),), dtype=torch.int32, device=device)
    out = moe_xe.grouped_gemm(a[:50], w, rows, gather_indices=pairs, gather_divisor=3, check=True)
    assert_right(out, a[pairs.long() // 3], w, COUNTS)


def test_strided_operands_are_used_in_place(device):
    big_a, big_d = torch.randn(sum(COUNTS), 200, device=device), poisoned(sum(COUNTS), N + 50, torch.float32, device)
    big_w = torch.randn(2 * len(COUNTS), N + 20, K + 30, device=device)
    a, w, out = big_a[:, 40:40 + K], big_w[::2, 10:10 + N, :K], big_d[:, 13:13 + N]
    moe_xe.grouped_gemm(a, w, torch.tensor(COUNTS, dtype=torch.int32, device=device), out=out)
    assert_right(out, a, w, COUNTS)
    assert big_d[:, :13].isnan().all() and big_d[:, 13 + N:].isnan().all()


def test_static_and_dynamic_schedules_and_two_runs_are_bitwise_equal(device):
    a, w, rows, _ = make(COUNTS, N, K, torch.bfloat16, device)
    first = moe_xe.grouped_gemm(a, w, rows)
    assert torch.equal(first, moe_xe.grouped_gemm(a, w, rows))
    assert torch.equal(first, moe_xe.grouped_gemm(a, w, rows, schedule="static"))


@pytest.mark.parametrize("counts", [[10, 2**31 - 1, 2**31 - 1, 5], [-5, 8, -(2**31), 40], [200, 200, 200, 200]])
def test_wrong_counts_touch_nothing_outside(counts, device):
    guard = 64
    big = poisoned(100 + 2 * guard, N, torch.float32, device)
    a, w, _, _ = make([25] * 4, N, K, torch.float32, device)
    moe_xe.grouped_gemm(a, w, torch.tensor(counts, dtype=torch.int32, device=device), out=big[guard:-guard])
    assert big[:guard].isnan().all() and big[-guard:].isnan().all()


def test_rows_beyond_the_counts_stay_as_they_are(device):
    a, w, _, _ = make([30] * 3, N, K, torch.float32, device)
    out = torch.full((90, N), 7.0, device=device)
    moe_xe.grouped_gemm(a, w, torch.tensor([20, 0, 30], dtype=torch.int32, device=device), out=out)
    assert (out[50:] == 7.0).all()
    assert_right(out[:50], a[:50], w, [20, 0, 30])


def test_inf_and_nan_stay_in_their_row(device):
    a, w, rows, _ = make([6, 9], N, K, torch.bfloat16, device)
    a[3, 5], a[8, 0] = float("inf"), float("nan")
    out = moe_xe.grouped_gemm(a, w, rows)
    clean = [r for r in range(15) if r not in (3, 8)]
    assert not out[3].isfinite().any() and out[8].isnan().all() and out[clean].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 20), (5, 0)])
def test_nothing_to_compute(shape, device):
    rows, n = shape
    a, w = torch.randn(rows, 8, device=device), torch.randn(3, n, 8, device=device)
    out = moe_xe.grouped_gemm(a, w, torch.tensor([rows, 0, 0], device=device))
    assert out.shape == shape


def test_no_rows_for_any_expert(device):
    a, w, _, _ = make([4], N, K, torch.float32, device)
    out = torch.full((4, N), 3.0, device=device)
    moe_xe.grouped_gemm(a, w, torch.zeros(1, dtype=torch.int32, device=device), out=out)
    assert (out == 3.0).all()


def test_several_threads(device):
    cases = [make([3 * t, 40, t], N, K, torch.bfloat16, device) for t in range(6)]
    expected = [moe_xe.grouped_gemm(*case[:3]) for case in cases]
    assert_threads_agree(lambda case: moe_xe.grouped_gemm(*case[:3]), cases, expected, rounds=20)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n, k, experts = 1024, 1 << 20, 3
    w = torch.empty(experts, n, k, dtype=torch.bfloat16).fill_(2.0**-10)
    w[2, 1000:] = 0.5
    a = torch.ones(4, k, dtype=torch.bfloat16)
    out = moe_xe.grouped_gemm(a, w, torch.tensor([1, 1, 2]), out_dtype=torch.float32)
    expected = torch.full((4, n), k * 2.0**-10)
    expected[2:, 1000:] = k * 0.5
    assert torch.equal(out, expected)


def test_explain_says_what_would_run(device):
    a, w, rows, _ = make(COUNTS, 203, 141, torch.bfloat16, device)
    plan = moe_xe.explain(a, w, rows)
    assert (plan.problem.n, plan.problem.k) == (203, 141) and plan.num_groups >= 1
    assert sum(tile.rows for tile in tiles(COUNTS, 203, plan.config) if tile.column == 0) == sum(COUNTS)


@pytest.mark.cpu_device
def test_float32_is_exact_even_where_tf32_is_allowed_on_the_cpu_device():
    a, w, rows, _ = make(COUNTS, N, K, torch.float32, "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_right(moe_xe.grouped_gemm(a, w, rows), a, w, COUNTS)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_generic_kernel_on_the_cpu_device():
    """The path of any other GPU, forced: same queue, same arguments, another inner loop."""
    a, w, rows, b = make(COUNTS, N, K, torch.bfloat16, "cpu", torch.bfloat16)
    problem = moe_xe.explain(a, w, rows, bias=b).problem
    with force_config(generic_config(problem, 16)):        # of one height, as few rows have it, so that it compiles soon
        assert_right(moe_xe.grouped_gemm(a, w, rows, bias=b), a, w, COUNTS, b)


def test_a_queue_can_be_chosen():
    import dpctl

    a, w, rows, _ = make(COUNTS, N, K, torch.float32, "cpu")
    with moe_xe.on_queue(dpctl.SyclQueue("cpu", property="in_order")):
        assert_right(moe_xe.grouped_gemm(a, w, rows), a, w, COUNTS)
    with moe_xe.on_queue(runtime.Queue.create("cpu")):
        assert_right(moe_xe.grouped_gemm(a, w, rows), a, w, COUNTS)


@pytest.mark.parametrize("queue", ["cpu", 12345, True, 0, np.int64(4096), 1.0, None], ids=repr)
def test_a_queue_is_no_address(queue):
    with pytest.raises(TypeError, match=f"queue must be a dpctl.SyclQueue or a moe_xe Queue, got {type(queue).__name__}"):
        with moe_xe.on_queue(queue):
            raise AssertionError("not reached")


@pytest.mark.parametrize("capsule", [None, 12345, "SyclQueueRef"], ids=repr)
def test_a_queue_that_only_looks_like_dpctls_is_refused(capsule):
    class Queue:
        def _get_capsule(self):
            return capsule

    with pytest.raises(TypeError), moe_xe.on_queue(Queue()):
        raise AssertionError("not reached")
