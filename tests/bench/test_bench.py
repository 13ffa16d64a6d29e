import json
import math

import pytest
import torch

from moe_xe.bench import roofline
from moe_xe.bench.numerics import Difference, agrees, difference, reference_grouped_gemm
from moe_xe.bench.roofline import gemm_bytes, record_for
from moe_xe.bench.workloads import MODELS, recorded_layers, routed_rows
from moe_xe.device import facts_of, queue_for
from moe_xe.plan.model.devices import RECORDS, DeviceRecord, find_record
from moe_xe.plan.problem import Dtype
from moe_xe.timing import interleaved_medians


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding_agrees_and_one_wrong_value_does_not(dtype):
    reference = torch.randn(50, 60, dtype=torch.float64)
    result = reference.to(dtype)
    assert agrees(result, reference, k=64)
    wrong = result.clone()
    wrong[17, 3] += 0.2
    assert not agrees(wrong, reference, k=64)
    wrong[17, 3] = float("nan")
    assert not agrees(wrong, reference, k=64)


def test_a_small_scale_error_is_seen_by_calc_diff():
    reference = torch.randn(500, 60, dtype=torch.float64)
    assert not agrees((reference * 1.006).bfloat16(), reference, k=64)


@pytest.mark.parametrize("x", [torch.randn(4, 5), torch.randn(4, 5)[:0], torch.zeros(4, 5), torch.full((2, 3), 1e-200, dtype=torch.float64)],
                         ids=["random", "empty", "zeros", "tiny"])
def test_equal_tensors_do_not_differ(x):
    assert difference(x, x.clone()) == Difference(0, 0)


def test_one_zero_tensor():
    x, zeros = torch.randn(4, 5), torch.zeros(4, 5)
    found = difference(zeros, x)
    assert found.max_error == pytest.approx(float(x.abs().max() / x.square().mean().sqrt())) and found.calc_diff == pytest.approx(1)
    assert difference(x, zeros).calc_diff == pytest.approx(1) and difference(x, zeros).max_error > 1e300
    assert not agrees(zeros, x, k=64) and not agrees(x, zeros, k=64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["result", "reference", "both"])
def test_what_is_not_finite_does_not_agree(value, where):
    result, reference = torch.ones(2, 4, 5).unbind()
    for tensor in {"result": [result], "reference": [reference], "both": [result, reference]}[where]:
        tensor[1, 2] = value
    assert not math.isfinite(difference(result, reference).max_error)
    assert not agrees(result, reference, k=10**6)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"result must have reference's shape \[4, 5\], got \[1, 5\]"):
        difference(torch.ones(1, 5), torch.ones(4, 5))


def test_reference_is_a_loop_over_experts():
    a, w, bias = torch.randn(5, 3), torch.randn(2, 4, 3), torch.randn(2, 4)
    out = reference_grouped_gemm(a, w, [2, 3], bias)
    assert torch.allclose(out[1].float(), w[0] @ a[1] + bias[0]) and torch.allclose(out[4].float(), w[1] @ a[4] + bias[1])


def test_recorded_layers_are_the_published_table():
    layers = recorded_layers()
    assert len(layers) == 24 and all(len(layer) == 32 for layer in layers) and sum(layers[0]) == 7529


def test_routed_rows_count_every_token_top_k_times():
    model = MODELS["qwen3-30b-a3b"]
    rows = routed_rows(model, 100, torch.Generator().manual_seed(1))
    assert len(rows) == 128 and sum(rows) == 800 and max(rows) <= 100


def test_medians_are_of_each_call_and_calls_take_turns():
    order = []
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), 0)
    assert set(medians) == {"a", "b"} and all(0 < t < 1 for t in medians.values())
    assert "ab" in "".join(order) and "ba" in "".join(order)


def test_bytes_count_only_experts_that_have_rows():
    assert gemm_bytes([3, 0, 1], n=10, k=20, in_size=2, out_size=4) == 4 * 20 * 2 + 2 * 200 * 2 + 4 * 10 * 4
    assert gemm_bytes([3, 0, 1], n=10, k=20, in_size=2, out_size=4, weight_bytes=0.53125) == 4 * 20 * 2 + 212.5 + 4 * 10 * 4 - 0.5


def test_records_by_the_names_that_drivers_report():
    assert find_record("Intel(R) Arc(TM) B580 Graphics").xe_cores == 20
    assert find_record("Intel(R) Data Center GPU Max 1100").bandwidth == 1228.8
    assert find_record("Intel(R) Arc(TM) Pro B60 Graphics").name == "Arc Pro B60"
    assert find_record("some other card") is None


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_roofline_is_the_slower_of_both_limits(record):
    flops, num_bytes = 1e12, 1e6
    assert record.roofline_seconds(flops, num_bytes, Dtype.bf16) == pytest.approx(1 / record.tflops["bf16"])
    assert record.roofline_seconds(0, 1e9, Dtype.bf16) == pytest.approx(1 / record.bandwidth)
    assert record.roofline_seconds(flops, 0, Dtype.f32, tf32=True) < record.roofline_seconds(flops, 0, Dtype.f32)


def test_the_cpus_measured_record_is_plausible():
    record = record_for(torch.device("cpu"))
    assert record.bandwidth > 1 and all(0.001 < rate < 1000 and math.isfinite(rate) for rate in record.tflops.values())
    assert record.tflops["bf16"] >= record.tflops["f32"]


def test_the_cpu_is_measured_once_for_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_XE_CACHE_DIR", str(tmp_path))
    facts, measured = facts_of(queue_for(torch.device("cpu"))), []

    def measure(name, cores):
        measured.append(DeviceRecord(name, cores, {"bf16": 2.0, "f16": 1.5, "f32": 1.0}, 30.5 + len(measured), "here"))
        return measured[-1]

    monkeypatch.setattr(roofline, "_measured_cpu", measure)
    first = roofline._cpu_record(facts)
    assert roofline._cpu_record(facts) == first and len(measured) == 1
    roofline.device_cache().clear()
    assert roofline._cpu_record(facts) != first and len(measured) == 2
    disk = roofline.device_cache()
    ((key, _),) = disk.entries()
    kept = json.loads(disk.load(key))
    for wrong in (b"", b"\xff", b"[" * 100_000, b"[]", b'{"name": "of another version"}', *(json.dumps(kept | change).encode() for change in (
            {"tflops": [1.0]}, {"tflops": {"bf16": 1.0}}, {"tflops": kept["tflops"] | {"f32": "fast"}}, {"bandwidth": None},
            {"bandwidth": float("nan")}, {"bandwidth": 10**400}, {"xe_cores": 2.5}, {"architecture": {}}))):
        disk.store(key, wrong)
        del measured[2:]
        assert roofline._cpu_record(facts) == measured[2]
    assert roofline._cpu_record(facts) == measured[2]
