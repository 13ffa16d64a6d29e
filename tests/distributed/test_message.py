"""What travels of a row is what comes."""
from __future__ import annotations

import pytest
import torch

from moe_xe.distributed.message import RowFormat

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 32])
@pytest.mark.parametrize("slots", [0, 3])
def test_comes_as_it_left(dtype, hidden_size, slots):
    format = RowFormat(hidden_size, dtype, slots, slots)
    rows, ids, weights = torch.randn(5, hidden_size).to(dtype), torch.randint(-1, 2**31 - 1, (5, slots)), torch.randn(5, slots)
    message = format.pack(rows, ids, weights)
    assert message.shape == (5, format.words) and format.words * 4 % 64 == 0
    assert format.words * 4 - 63 <= hidden_size * dtype.itemsize + 8 * slots + 3
    got, got_ids, got_weights = format.unpack(message.clone())
    assert torch.equal(got, rows)
    assert (got_ids is got_weights is None) if not slots else (torch.equal(got_ids, ids.int()) and torch.equal(got_weights, weights))


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes(wire, dtype):
    """A code is at most half a step away, of the row's largest number, or, in float8, of the number itself and the smallest one."""
    rows = (torch.randn(6, 50) * torch.tensor([1e-6, 1e-3, 1, 10, 1e3, 1e4])[:, None]).to(dtype)
    rows[2] = 0
    format = RowFormat(50, dtype, 2, 2, wire)
    message = format.pack(rows, torch.zeros(6, 2), torch.ones(6, 2))
    assert format.words * 4 == 128
    got, _, weights = format.unpack(message)
    assert got.dtype == dtype and torch.equal(weights, torch.ones(6, 2))
    scale = rows.abs().amax(1, keepdim=True).double() / (127 if wire == "int8" else 448)
    step = scale if wire == "int8" else torch.maximum(rows.double().abs() / 8, scale / 512)
    rounding = rows.double().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert ((got.double() - rows.double()).abs() <= step / 2 * 1.001 + rounding).all()


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_scale_come_out_as_nan(wire, value):
    rows = torch.randn(2, 8)
    rows[1, 3] = value
    got, *_ = (format := RowFormat(8, torch.float32, wire=wire)).unpack(format.pack(rows))
    assert got[0].isfinite().all() and got[1].isnan().all()


@pytest.mark.parametrize("wire", ["int8", "fp8_e4m3"])
def test_smallest_numbers_do_not_wrap(wire):
    rows = torch.tensor([[1e-42, -1e-42, 3e-43, 0.0]])
    got, *_ = (format := RowFormat(4, torch.float32, wire=wire)).unpack(format.pack(rows))
    assert ((got - rows).abs() <= 1e-42).all() and (got * rows >= 0).all()


def test_gradients_travel_in_their_own_precision():
    format = RowFormat(6, torch.bfloat16, 2, 2, "int8").of_gradients
    rows, weights = torch.randn(3, 6).bfloat16(), torch.randn(3, 2)
    got, ids, got_weights = format.unpack(format.pack(rows, None, weights))
    assert ids is None and torch.equal(got, rows) and torch.equal(got_weights, weights)
    assert torch.equal(format.unpack(format.pack(rows))[2], torch.zeros(3, 2))


def test_unknown_wire():
    with pytest.raises(ValueError, match="wire and wire_back must be None, 'int8' or 'fp8_e4m3', got 'int4'"):
        RowFormat(6, torch.bfloat16, wire="int4")
