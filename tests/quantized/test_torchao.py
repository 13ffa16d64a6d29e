"""torchao's tensors by attributes of their names; torchao is not there."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_xe import QuantizedWeight

from .test_checkpoints import E, FP8, K, N, NUMBERS, in_place, numbers, nvfp4, pairs, same, scales_of, spread, table, words


def tensor_of(kind: str, **attributes):
    return type(kind, (SimpleNamespace,), {})(**attributes)


BLOCKS = [((1, 1, K), (E, N, 1)), ((1, 8, 48), (E, 3, 2)), ((1, N, K), (E, 1, 1)), ((E, N, K), (1, 1, 1))]


@pytest.mark.parametrize("block_size, shape", BLOCKS)
@pytest.mark.parametrize("kind, dtype", [("Int8Tensor", torch.int8), ("Float8Tensor", torch.float8_e4m3fn), ("Float8Tensor", torch.float8_e5m2)])
def test_codes_of_8_bits(kind, dtype, block_size, shape):
    codes, scale = numbers(8, E, N, K), scales_of(torch.bfloat16, *shape)
    qdata = codes.to(torch.uint8).view(dtype)
    expected = table(codes, NUMBERS["int8"] if dtype == torch.int8 else FP8[dtype]) * spread(scale.expand(E, -1, -1).double(), *block_size[1:], N, K)
    made = QuantizedWeight.from_torchao(tensor_of(kind, qdata=qdata, scale=scale, block_size=list(block_size)))
    same(made, expected)
    assert in_place(made.codes, qdata) and made.scales.dtype == torch.bfloat16
    if block_size[0] == 1:
        one = tensor_of(kind, qdata=qdata[1], scale=scale[1], block_size=list(block_size[1:]))
        same(QuantizedWeight.from_torchao(one), expected[1:2])


def test_int8_with_zero_points():
    codes, scale, zeros = numbers(8, E, N, K), scales_of(torch.float32, E, N, 1), torch.randint(-128, 128, (E, N, 1), dtype=torch.int8)
    tensor = tensor_of("Int8Tensor", qdata=codes.to(torch.uint8).view(torch.int8), scale=scale, zero_point=zeros, block_size=[1, 1, K])
    same(QuantizedWeight.from_torchao(tensor), (table(codes, NUMBERS["int8"]) - zeros) * scale.double())


@pytest.mark.parametrize("zero", [None, 8])
def test_int4_plain_int32(zero):
    codes, scale = numbers(4, N, K), scales_of(torch.float16, 3, N)
    zeros = numbers(4, 3, N).to(torch.int8) if zero is None else torch.full((3, N), zero, dtype=torch.int8)
    tensor = tensor_of("Int4PlainInt32Tensor", qdata=words(codes, 4, 1), scale=scale, zero_point=zeros, block_size=[1, 32], act_pre_scale=None)
    made = QuantizedWeight.from_torchao(tensor)
    same(made, (codes[None] - spread(zeros.T[None], 1, 32, N, K)) * spread(scale.T[None].double(), 1, 32, N, K))
    assert in_place(made.codes, tensor.qdata) and (made.zeros is None) == (zero == 8)


def test_int4_whose_zero_point_is_added():
    codes, scale, added = numbers(4, E, N, K), scales_of(torch.bfloat16, E, 3, N), torch.randn(E, 3, N).bfloat16()
    tensor = tensor_of("Int4Tensor", qdata=pairs(codes).view(torch.int8), scale=scale, zero_point=added, block_size=[1, 1, 32])
    made = QuantizedWeight.from_torchao(tensor)
    expected = table(codes, NUMBERS["int4"]) * spread(scale.mT.double(), 1, 32, N, K) + spread(added.mT.double(), 1, 32, N, K)
    torch.testing.assert_close(made.dequantize(torch.float64), expected, rtol=0, atol=2**-22 * added.abs().max().item())
    assert in_place(made.codes, tensor.qdata)


def test_powers_of_two_and_nvfp4():
    exponents, codes = numbers(8, E, N, K // 32) % 40 + 100, numbers(8, E, N, K)
    scale, powers = exponents.to(torch.uint8).view(torch.float8_e8m0fnu), spread(2.0 ** (exponents - 127.0), 1, 32, N, K)
    mxfp8 = tensor_of("MXTensor", qdata=codes.to(torch.uint8).view(torch.float8_e4m3fn), scale=scale, block_size=32, _is_swizzled_scales=False)
    same(QuantizedWeight.from_torchao(mxfp8), table(codes, FP8[torch.float8_e4m3fn]) * powers)
    mxfp4 = tensor_of("MXTensor", qdata=pairs(codes % 16), scale=scale, block_size=32)
    same(QuantizedWeight.from_torchao(mxfp4), table(codes % 16, NUMBERS["mxfp4"]) * powers)
    packed, scales, values = nvfp4()
    for factor in (torch.tensor(0.3), torch.tensor([[[0.3]], [[0.2]], [[0.1]]]), None):
        tensor = tensor_of("NVFP4Tensor", qdata=packed, scale=scales, per_tensor_scale=factor, is_swizzled_scales=False)
        same(QuantizedWeight.from_torchao(tensor), values * (1 if factor is None else factor.double()))


INT8 = dict(qdata=torch.zeros(E, N, K, dtype=torch.int8), scale=torch.ones(E, N, 1), block_size=[1, 1, K])
BAD = [
    ("Tensor", INT8, TypeError, "tensor must be one of torchao's Int8Tensor, .*, got Tensor"),
    ("Int8Tensor", INT8 | dict(act_pre_scale=torch.ones(K)), ValueError, "tensor.act_pre_scale must be None"),
    ("MXTensor", INT8 | dict(_is_swizzled_scales=True), ValueError, "tensor.is_swizzled_scales must be False"),
    ("NVFP4Tensor", INT8 | dict(is_swizzled_scales=True), ValueError, "tensor.is_swizzled_scales must be False"),
    ("Int8Tensor", INT8 | dict(scale=torch.ones(E, 2)), ValueError, r"tensor.scale must have one element for each block \[1, 1, 96\], got \[3, 2\]"),
    ("Float8Tensor", INT8 | dict(qdata=torch.zeros(E, N, K)), TypeError, "tensor.qdata must be int8, .*, got torch.float32"),
    ("MXTensor", INT8 | dict(block_size=32), TypeError, "tensor.qdata must be of 4 or 8 bits, got torch.int8"),
]


@pytest.mark.parametrize("kind, attributes, error, message", BAD, ids=range(len(BAD)))
def test_wrong_tensor(kind, attributes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        QuantizedWeight.from_torchao(tensor_of(kind, **attributes))
