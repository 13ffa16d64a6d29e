import math

import pytest
import torch

from moe_xe import QuantizedWeight

from .reference import dense, random_weight

CASES = [   # format, heights of the parts, their groups, the group that comes out
    ("uint4", (5, 3), [(1, 32)] * 2, (1, 32)),
    ("fp8_e4m3", (8, 4), [(4, 32)] * 2, (4, 32)),
    ("fp8_e4m3", (8, 6, 4), [(4, 32)] * 3, (2, 32)),     # groups do not meet at 14
    ("fp8_e4m3", (7, 7), [(7, 70)] * 2, (7, 70)),        # one scale for each part
    ("fp8_e4m3", (6, 9), [(128, 128)] * 2, (6, 128)),    # the last part is one group, however high
    ("int8", (6, 10), [(6, 7), (4, 7)], (2, 7)),
    ("fp8_e5m2", (5, 3), [(2, 32)] * 2, (1, 32)),
    ("mxfp4", (1, 4), [None] * 2, (1, 32)),
    ("nvfp4", (2, 3), [None] * 2, (1, 16)),
]


def joined(parts) -> torch.Tensor:
    return torch.cat([torch.from_numpy(dense(part)) for part in parts], 1)


def same(weight, expected) -> None:
    computed = weight.dequantize(torch.float64)
    assert computed.shape == expected.shape and torch.equal(computed.nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format, heights, groups, group", CASES)
def test_rows(format, heights, groups, group, transposed):
    parts = [random_weight(format, (2, n, 70), of, seed=i) for i, (n, of) in enumerate(zip(heights, groups))]
    weight = QuantizedWeight.cat([part.mT if transposed else part for part in parts], 2 if transposed else 1)
    assert weight.group == group and weight.transposed == transposed
    same(weight, joined(parts).mT if transposed else joined(parts))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "uint4", "fp8_e4m3"])
def test_experts(format):
    parts = [random_weight(format, (count, 5, 70), seed=count, global_scales=format == "nvfp4") for count in (1, 3, 2)]
    weight = QuantizedWeight.cat(parts)
    same(weight, torch.cat([part.dequantize(torch.float64) for part in parts]))
    assert weight.num_experts == 6 and QuantizedWeight.cat(parts[:1]) is parts[0]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("format, zero", [("int4", 0), ("uint4", 8)])
def test_zeros_of_some(format, zero, dim):
    parts = [random_weight(format, (2, 4, 70), zeros=i == 0, seed=i) for i in range(2)]
    weight = QuantizedWeight.cat(parts, dim)
    same(weight, torch.cat([part.dequantize(torch.float64) for part in parts], dim))
    assert torch.equal(weight.zeros.narrow(dim, 2 if dim == 0 else 4, 2), torch.full_like(weight.zeros.narrow(dim, 0, 2), zero))


def test_global_scales_become_part_of_float_scales():
    parts = [random_weight("uint4", (2, 4, 70), scale_dtype=torch.bfloat16, zeros=True, global_scales=i > 0, seed=i) for i in range(3)]
    weight = QuantizedWeight.cat(parts, 1)
    assert weight.global_scales is None and weight.scales.dtype == weight.zeros.dtype == torch.float32
    torch.testing.assert_close(weight.dequantize(torch.float64), joined(parts), rtol=2**-23, atol=0)
    equal = QuantizedWeight.cat([parts[1]] * 2, 1)
    assert torch.equal(equal.global_scales, parts[1].global_scales) and equal.scales.dtype == torch.bfloat16


def nvfp4(*global_scales: float) -> QuantizedWeight:
    scales = torch.tensor([[[8.0, 1.5], [0.125, 448]]]).expand(len(global_scales), -1, -1).contiguous().to(torch.float8_e4m3fn)
    codes = torch.randint(256, (len(global_scales), 2, 16), dtype=torch.uint8)
    return QuantizedWeight(codes, scales, global_scales=torch.tensor(global_scales), format="nvfp4")


def test_global_scales_of_nvfp4():
    first, double, other = nvfp4(0.3, 0.7), nvfp4(0.6, 0.7), nvfp4(0.4, 0.7)
    for parts in ([first, first], [first, double]):     # scales of the smaller one are halved, exactly
        weight = QuantizedWeight.cat(parts, 1)
        assert math.isclose(weight.global_scales[0], max(part.global_scales[0] for part in parts)) and weight.format == "nvfp4"
        same(weight, joined(parts))
    with pytest.raises(ValueError, match="weights must have the same global scales, or such that .*float8_e4m3fn, got"):
        QuantizedWeight.cat([first, other], 1)


ONE, TURNED = random_weight("uint4", (2, 4, 70)), random_weight("uint4", (2, 4, 70)).mT
BAD = [
    (([],), ValueError, "weights must not be empty"),
    (([ONE, ONE.codes],), TypeError, "weights must be QuantizedWeights, got Tensor at 1"),
    (([ONE, ONE], 2), ValueError, r"dim must be 0 \(experts\) or 1 \(outputs\), got 2"),
    (([TURNED, TURNED], 1), ValueError, r"dim must be 0 \(experts\) or 2 \(outputs\), got 1"),
    (([ONE, TURNED],), ValueError, "weights must be alike but along dim = 0, got .*'transposed': False.* at 1, .*'transposed': True"),
    (([ONE, random_weight("int4", (2, 4, 70))],), ValueError, "'format': 'uint4'.* at 1, .*'format': 'int4'"),
    (([ONE, random_weight("uint4", (2, 4, 72))],), ValueError, r"'sizes': \[4, 35\].* at 1, .*'sizes': \[4, 36\]"),
    (([ONE, random_weight("uint4", (3, 4, 70))], 1), ValueError, r"'sizes': \[2, 35\].* at 1, .*'sizes': \[3, 35\]"),
    (([ONE, random_weight("uint4", (2, 4, 70), (1, 8))], 1), ValueError, "'group': 32.* at 1, .*'group': 8"),
    (([ONE, random_weight("uint4", (2, 4, 70), scale_dtype=torch.float16)],), ValueError, "'scales': torch.float32.* at 1, .*torch.float16"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=range(len(BAD)))
def test_wrong_weights(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantizedWeight.cat(*arguments)
