"""What tuning results depend on."""
import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_xe.jit import cache_key
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.plan.outer.config import Gathered
from moe_xe.plan.problem import Activation, ActivationKind, Dtype, RowScale, RowsFormat, WeightLayout
from moe_xe.tuning import TuningKey, key as key_module, rows_bucket, skew_bucket

from .example import DEFAULT, OUTER, OUTER_DEFAULT, PROBLEM, STATIC, Device, key

OTHER = {"n": 97, "k": 65, "input": Dtype.f16, "output": Dtype.bf16, "weights": WeightLayout.ekn, "bias": Dtype.f32,
         "rows_format": RowsFormat.ends, "rows_bits": 64, "gathered": True, "tf32": True, "scattered": True, "slots": 2,
         "row_scale": RowScale.sums, "shared": 1, "activation": None, "quantization": None, "ranks": 2}
OTHER_OUTER = {"p": 97, "q": 65, "input": Dtype.f16, "output": Dtype.bf16, "rows_format": RowsFormat.ends, "rows_bits": 64,
               "gathered": Gathered.left, "slots": 2, "accumulate": True, "ranks": 2}
CODES = Quantization(Codes.e2m1, ScaleType.e8m0, 1, 32)
OTHER_CODES = {"codes": Codes.int4, "scales": ScaleType.f16, "rows": 2, "columns": 16, "zero": 8.0, "zeros": True, "global_scales": True,
               "finite": False}
OTHER_ACTIVATION = {"kind": ActivationKind.gelu, "gated": False, "interleaved": True, "alpha": 1.5, "limit": None}


@given(st.integers(1, 1 << 40))
def test_rows_bucket_is_the_next_power_of_two(rows):
    bucket = rows_bucket(rows)
    assert bucket & (bucket - 1) == 0 and rows <= bucket < 2 * rows


def test_rows_bucket_of_nothing():
    assert rows_bucket(0) == 1


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=64))
def test_skew_bucket_is_a_small_number(tokens_per_expert):
    bucket, total = skew_bucket(tokens_per_expert), sum(tokens_per_expert)
    assert 0 <= bucket <= 6
    assert total == 0 or abs(bucket - math.log2(max(tokens_per_expert) * len(tokens_per_expert) / total)) <= 0.5 + 1e-9


@pytest.mark.parametrize("tokens_per_expert, bucket", [([5] * 32, 0), ([0] * 32, 0), ([0] * 31 + [7], 5), ([3, 1], 1), ([4], 0)])
def test_skew_bucket(tokens_per_expert, bucket):
    assert skew_bucket(tokens_per_expert) == bucket


def test_equal_calls_and_those_of_one_bucket_share_a_key():
    assert key() == key(device=Device(), problem=replace(PROBLEM)) and hash(key()) == hash(key())
    assert key(total_rows=65) == key(total_rows=128) != key(total_rows=129)
    assert key(default=replace(DEFAULT, raster_group=7)) == key()     # what the default is does not matter, but its class


@pytest.mark.parametrize("field", [field.name for field in fields(Device)])
def test_every_part_of_the_device_is_in_the_key(field):
    other = {"xe_cores": 21, "kind": "gpu"}.get(field, "other")
    assert key(replace(Device(), **{field: other})) != key()


@pytest.mark.parametrize("distribution", ["moe_xe", "intel-sycl-rt"])
def test_versions_are_in_the_key(monkeypatch, distribution):
    before, versions = key(), cache_key._version
    monkeypatch.setattr(cache_key, "_version", lambda name: "other" if name == distribution else versions(name))
    key_module._tuning_key.cache_clear()
    other = key()
    key_module._tuning_key.cache_clear()
    assert other != before


def test_the_kernels_sources_are_in_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(cache_key, "sources_digest", lambda: "other")
    key_module._tuning_key.cache_clear()
    other = key()
    key_module._tuning_key.cache_clear()
    assert replace(other, shipped_sources=before.shipped_sources) == before != other


def test_every_fusion_is_in_the_key():
    assert set(OTHER) == {field.name for field in fields(PROBLEM)}
    assert set(OTHER_OUTER) == {field.name for field in fields(OUTER)}
    assert set(OTHER_ACTIVATION) == {field.name for field in fields(Activation)}
    assert set(OTHER_CODES) == {field.name for field in fields(Quantization)}
    quantised = replace(PROBLEM, quantization=CODES)
    keys = [key(), key(problem=OUTER, default=OUTER_DEFAULT), key(problem=quantised)]
    keys += [key(problem=replace(PROBLEM, **{name: value})) for name, value in OTHER.items() if name != "quantization"]
    keys += [key(problem=replace(quantised, quantization=replace(CODES, **{name: value}))) for name, value in OTHER_CODES.items()]
    keys += [key(problem=replace(PROBLEM, activation=replace(PROBLEM.activation, **{name: value})))
             for name, value in OTHER_ACTIVATION.items()]
    keys += [key(problem=replace(OUTER, **{name: value}), default=OUTER_DEFAULT) for name, value in OTHER_OUTER.items()]
    assert len(set(keys)) == len(keys)


def test_the_call_is_in_the_key():
    keys = [key(), key(num_experts=9), key(total_rows=1000), key(skew=0), key(skew=1), key(default=STATIC),
            key(default=OUTER_DEFAULT), key(restriction="no splits")]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("of", [key(), key(skew=3), key(problem=OUTER, default=OUTER_DEFAULT)], ids=["unread", "skew", "outer"])
def test_facts_survive_json(of):
    facts = json.loads(json.dumps(of.facts()))
    assert facts == of.facts() and TuningKey.from_facts(facts) == of


@pytest.mark.parametrize("change, said", [
    ({"device": 3}, "device"), ({"cores": "20"}, "cores"), ({"rows_bucket": True}, "rows_bucket"),
    ({"skew_bucket": "much"}, "skew_bucket"), ({"problem": []}, "problem"), ({"problem": {"n": [1]}}, "n of a key's problem"),
    ({"more": 1}, "rows_bucket")])
def test_what_is_no_key(change, said):
    with pytest.raises(ValueError, match=said):
        TuningKey.from_facts(key().facts() | change)
    with pytest.raises(ValueError, match="device"):
        TuningKey.from_facts({name: value for name, value in key().facts().items() if name != "device"})
    with pytest.raises(ValueError, match="a key must be an object"):
        TuningKey.from_facts([])
