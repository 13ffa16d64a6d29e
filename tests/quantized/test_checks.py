import dataclasses

import pytest
import torch

import moe_xe

from .reference import random_weight

RIGHT = random_weight("uint4", (3, 5, 70), (2, 32), torch.float16, zeros=True, global_scales=True)
BYTES = torch.zeros(3, 5, 64, dtype=torch.uint8)
BAD = [
    (dict(format=None), TypeError, "format must be a str, got NoneType"),
    (dict(format="int3"), ValueError, "format must be one of mxfp4, .*mxfp8, got 'int3'"),
    (dict(group=None), TypeError, r"group must be \(gn, gk\), as uint4 has none of its own"),
    (dict(group=32), TypeError, "group must be two ints .* got 32"),
    (dict(group=(1, 2, 3)), TypeError, r"group must be two ints .* got \(1, 2, 3\)"),
    (dict(group=(1, 32.0)), TypeError, "group must be two ints"),
    (dict(group=(1, True)), TypeError, "group must be two ints"),
    (dict(group=(0, 32)), ValueError, r"group must be positive, got \(0, 32\)"),
    (dict(format="mxfp4"), ValueError, r"group must be \(1, 32\) for mxfp4, got \(2, 32\)"),
    (dict(codes=[1]), TypeError, r"codes must be a torch.Tensor \[E, N, K / 2\], got list"),
    (dict(codes=RIGHT.codes[0]), ValueError, r"codes must have 3 dimensions \[E, N, K / 2\], got uint8\[5, 35\]"),
    (dict(codes=RIGHT.codes.to_sparse()), TypeError, "codes must be a dense tensor, got layout torch.sparse_coo"),
    (dict(codes=RIGHT.codes.to(torch.int8)), TypeError, "codes must be torch.uint8 for uint4, got torch.int8"),
    (dict(codes=BYTES[..., :35].clone(), format="int8"), TypeError, "codes must be torch.int8 for int8, got torch.uint8"),
    (dict(codes=BYTES.view(torch.float8_e5m2), format="fp8_e4m3"), TypeError,
     "codes must be torch.float8_e4m3fn or torch.uint8 for fp8_e4m3, got torch.float8_e5m2"),
    (dict(codes=BYTES[..., :35]), ValueError, r"codes must be contiguous within an expert, got strides \[320, 64, 1\]"),
    (dict(codes=BYTES[:, ::2]), ValueError, r"codes must be contiguous within an expert, got strides \[320, 128, 1\]"),
    (dict(codes=BYTES.mT), ValueError, r"codes must be contiguous within an expert, got strides \[320, 1, 64\]"),
    (dict(scales=None), TypeError, r"scales must be a torch.Tensor \[E, ceil\(N / gn\), ceil\(K / gk\)\], got NoneType"),
    (dict(scales=RIGHT.scales[0]), ValueError, "scales must have 3 dimensions .* got float16"),
    (dict(scales=RIGHT.scales.double()), TypeError,
     "scales must be torch.float32, torch.float16 or torch.bfloat16 for uint4, got torch.float64"),
    (dict(scales=RIGHT.scales.to(torch.uint8)), TypeError, "scales must be .* for uint4, got torch.uint8"),
    (dict(scales=RIGHT.scales[:, :2].clone()), ValueError, r"scales must be \[3, 3, 3\] for codes \[3, 5, 35\], got float16\[3, 2, 3\]"),
    (dict(scales=RIGHT.scales[:2]), ValueError, r"scales must be \[3, 3, 3\] for codes \[3, 5, 35\], got float16\[2, 3, 3\]"),
    (dict(scales=RIGHT.scales.mT), ValueError, r"scales must be contiguous, got strides \[9, 1, 3\]: call its contiguous\(\)"),
    (dict(scales=RIGHT.scales.repeat(2, 1, 1)[::2]), ValueError, r"scales must be contiguous, got strides \[18, 3, 1\]"),
    (dict(zeros=RIGHT.zeros[:1].expand(3, 3, 3)), ValueError, r"zeros must be contiguous, got strides \[0, 3, 1\]"),
    (dict(scales=RIGHT.scales.to("meta")), ValueError, "scales must be on the codes' device cpu, got meta"),
    (dict(zeros=8), TypeError, "zeros must be a torch.Tensor .* got int"),
    (dict(zeros=RIGHT.zeros.float()), TypeError, "zeros must have the scales' dtype torch.float16, got torch.float32"),
    (dict(zeros=RIGHT.zeros[..., :1].clone()), ValueError, r"zeros must be \[3, 3, 3\] for codes .* got float16\[3, 3, 1\]"),
    (dict(zeros=RIGHT.zeros.to("meta")), ValueError, "zeros must be on the codes' device cpu"),
    (dict(codes=BYTES, format="fp8_e5m2", group=(5, 64), scales=RIGHT.scales[:, :1, :1].clone()), ValueError,
     r"zeros must be None for fp8_e5m2, got float16\[3, 3, 3\]"),
    (dict(global_scales=2.0), TypeError, r"global_scales must be a torch.Tensor \[E\], got float"),
    (dict(global_scales=RIGHT.global_scales.half()), TypeError, "global_scales must be torch.float32, got torch.float16"),
    (dict(global_scales=RIGHT.global_scales[:1]), ValueError, r"global_scales must be \[3\] for codes .* got float32\[1\]"),
    (dict(global_scales=RIGHT.global_scales[0]), ValueError, r"global_scales must have 1 dimensions \[E\], got float32\[\]"),
    (dict(global_scales=torch.ones(6)[::2]), ValueError, r"global_scales must be contiguous, got strides \[2\]"),
    (dict(global_scales=RIGHT.global_scales.to("meta")), ValueError, "global_scales must be on the codes' device"),
    (dict(transposed=1), TypeError, "transposed must be a bool, got int"),
]


@pytest.mark.parametrize("wrong, error, message", BAD, ids=range(len(BAD)))
def test_wrong_field(wrong, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(RIGHT, **wrong)


@pytest.mark.parametrize("format, scales", [("mxfp4", torch.float8_e4m3fn), ("nvfp4", torch.float8_e8m0fnu), ("mxfp8", torch.float32)])
def test_scales_of_another_format(format, scales):
    with pytest.raises(TypeError, match=f"scales must be .* for {format}, got {scales}"):
        random_weight(format, scale_dtype=scales)


def test_an_own_group_need_not_be_said():
    weight = random_weight("nvfp4")
    assert moe_xe.QuantizedWeight(weight.codes, weight.scales, format="nvfp4").group == (1, 16)


def test_experts_codes_may_lie_apart_and_one_row_or_byte_has_no_stride():
    codes, scales = torch.zeros(3, 8, 6, dtype=torch.uint8), torch.ones(3, 1, 1)
    for part in (codes[:, :4], codes[:, :1], codes[:, :1, :1], codes.mT[:, :, :1]):
        moe_xe.QuantizedWeight(part, scales, format="int4", group=(8, 32))
