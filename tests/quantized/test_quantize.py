import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_xe

from .reference import E8M0, FLOATS, FORMATS, NUMBERS, dense, parts, raw, scale_numbers, spread
from .test_weight import memory

LARGEST = {"mxfp4": 6, "nvfp4": 6, "int4": 7, "uint4": 7, "int8": 127, "fp8_e4m3": 448, "fp8_e5m2": 57344, "mxfp8": 448}
ROUNDING = 1 + 2**-20       # of float32 quotients and products
quantize = moe_xe.QuantizedWeight.quantize


def dense_weight(shape, dtype=torch.float32, size=1.0, seed=0) -> torch.Tensor:
    """Groups of many sizes, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    rows = size * torch.exp(2 * torch.randn(*shape[:2], 1, generator=generator))
    w = rows * torch.randn(shape, generator=generator)
    w[:, :, ::7] *= 8
    w[:, 1::3] = 0
    return w.to(dtype)


def groups_of(w: np.ndarray, group) -> tuple[np.ndarray, np.ndarray]:
    """Each group's smallest and largest, zero among them, [E, ceil(N / gn), ceil(K / gk)]."""
    (_, n, k), (rows, columns) = w.shape, group
    blocks = [[w[:, i:i + rows, j:j + columns] for j in range(0, k, columns)] for i in range(0, n, rows)]
    low, high = (np.array([[extreme(block, axis=(1, 2), initial=0.0) for block in line] for line in blocks]) for extreme in (np.min, np.max))
    return np.moveaxis(low, -1, 0), np.moveaxis(high, -1, 0)


def steps_around(format: str, numbers: np.ndarray) -> np.ndarray:
    """The distance of the codes that a number in code units lies between; past the ends, of the last two."""
    values = np.unique([value for value in NUMBERS[format] if np.isfinite(value)])
    above = np.clip(np.searchsorted(values, numbers), 1, len(values) - 1)
    return values[above] - values[above - 1]


def nearest(format: str, numbers: np.ndarray) -> np.ndarray:
    """The distance to the nearest code, in code units."""
    values = np.unique([value for value in NUMBERS[format] if np.isfinite(value)])
    above = np.clip(np.searchsorted(values, numbers), 1, len(values) - 1)
    return np.minimum(abs(numbers - values[above - 1]), abs(numbers - values[above]))


@st.composite
def cases(draw):
    format = draw(st.sampled_from(sorted(FORMATS)))
    bits, own, _, scale_dtypes, can_have_zeros = FORMATS[format]
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 40)) * (2 if bits == 4 else 1))
    group = own or (draw(st.integers(1, 9)), draw(st.integers(1, 90)))
    w = dense_weight(shape, draw(st.sampled_from(FLOATS)), draw(st.sampled_from([1e-30, 1e-6, 0.02, 1.0])), draw(st.integers(0, 2**32)))
    return w, format, group, draw(st.sampled_from(scale_dtypes)), not (can_have_zeros and draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_nearest_codes_within_the_bounds(case):
    w, format, group, scale_dtype, symmetric = case
    weight = quantize(w, format, group, scale_dtype=scale_dtype, symmetric=symmetric)
    assert weight.format == format and weight.group == group and weight.shape == w.shape and weight.scales.dtype == scale_dtype
    assert (weight.zeros is None) == symmetric and (weight.global_scales is None) == (format != "nvfp4")
    w = w.double().numpy()
    numbers, zeros, scales = parts(weight)
    error, wanted = abs(dense(weight) - w), w / scales + zeros
    slack = 2**-20 * (abs(w) + scales * abs(zeros)) + 1e-44
    assert (error <= nearest(format, wanted) * scales * ROUNDING + slack).all()
    if not symmetric:
        bound = 1.5 if format == "int8" and scale_dtype == torch.bfloat16 else 1.0
        assert (error <= bound * scales * ROUNDING + slack).all()
    elif scale_dtype not in E8M0:
        assert (error <= steps_around(format, wanted) / 2 * scales * ROUNDING + slack).all()
    else:
        inside = abs(wanted) <= LARGEST[format]
        assert (error <= steps_around(format, wanted) / 2 * scales * ROUNDING + slack)[inside].all()
        assert (error <= abs(w) / (4 if format == "mxfp4" else 8) + slack)[~inside].all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["int4", "uint4", "int8", "fp8_e4m3", "fp8_e5m2"])
def test_scales_are_the_largest_over_the_largest(format, dtype):
    w = dense_weight((2, 7, 70), size=300.0, seed=1)
    weight = quantize(w, format, (2, 32), scale_dtype=dtype)
    low, high = groups_of(w.numpy(), (2, 32))
    exact = torch.from_numpy(np.maximum(-low, high) / LARGEST[format]).to(dtype).double().numpy()
    scales = weight.scales.double().numpy()
    some = exact > 2.0**-8
    assert some.any() and np.allclose(scales[some], exact[some], rtol=2**-23 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["int4", "uint4", "int8"])
def test_scales_among_the_smallest_cut_nothing(format, dtype):
    limits = torch.finfo(dtype)
    w = (torch.arange(1, 40) / 3 * limits.tiny * limits.eps * LARGEST[format]).view(1, -1, 1) * torch.tensor([1.0, -0.4])
    weight = quantize(w, format, (1, 2), scale_dtype=dtype)
    assert (abs(dense(weight) - w.double().numpy()) <= parts(weight)[2] / 2 * ROUNDING).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", ["int4", "uint4", "int8"])
def test_zeros(format, dtype):
    w = dense_weight((2, 7, 70), seed=2).abs() - 0.3
    weight = quantize(w, format, (3, 16), scale_dtype=dtype, symmetric=False)
    low, high = groups_of(w.numpy(), (3, 16))
    first, last = min(NUMBERS[format]), max(NUMBERS[format])
    scales = weight.scales.double().numpy()
    assert np.allclose(scales, (high - low) / (last - first), rtol=torch.finfo(dtype).eps, atol=0)
    zeros = weight.zeros.double().numpy()
    assert weight.zeros.dtype == dtype and (zeros == zeros.round()).all()
    assert (abs(zeros - (first - low / scales).clip(first, last)) < 0.501).all()


@pytest.mark.parametrize("dtype", E8M0)
@pytest.mark.parametrize("format, exponent", [("mxfp4", 2), ("mxfp8", 8), ("fp8_e4m3", 8), ("fp8_e5m2", 15)])
def test_powers_of_two(format, exponent, dtype):
    largest = [0.0, 1e-44, 2.0**-126, 1.0, 1.9999999, 2.0, 6.0, 7.5, 448.0, 3e38]
    w = torch.zeros(1, len(largest), 32)
    w[0, :, 5] = -torch.tensor(largest)
    weight = quantize(w, format, (1, 32), scale_dtype=dtype)
    expected = [max(2.0**-127, 2.0 ** (np.floor(np.log2(np.float64(value))) - exponent)) if value else 2.0**-127
                for value in w[0, :, 5].abs().tolist()]
    assert scale_numbers(weight.scales, format)[0, :, 0].tolist() == expected
    assert weight.scales.dtype == dtype


def test_mxfp4_by_hand():
    w = torch.zeros(1, 1, 32)
    w[0, 0, :8] = torch.tensor([7.9, -5.0, 3.5, 0.25, -0.75, 1.3, 0.0, 6.0])
    weight = quantize(w, "mxfp4")
    assert raw(weight.codes)[0, 0, :4].tolist() == [0xE7, 0x06, 0x3A, 0x70] and raw(weight.scales).tolist() == [[[127]]]


def test_global_scales_of_nvfp4():
    w = dense_weight((3, 5, 70))
    w[1] = 0
    weight = quantize(w, "nvfp4")
    expected = w.abs().amax((1, 2)) / (448 * 6)
    assert torch.allclose(weight.global_scales[::2], expected[::2], rtol=2**-22) and weight.global_scales.dtype == torch.float32
    scales = scale_numbers(weight.scales, "nvfp4")
    assert scales[0].max() == scales[2].max() == 448 and (weight.dequantize()[1] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_nothing(format):
    for shape in ((2, 3, 64), (0, 3, 64), (2, 0, 64), (2, 3, 0)):
        weight = quantize(torch.zeros(shape), format)
        assert weight.shape == shape and torch.equal(weight.dequantize(), torch.zeros(shape))
        assert (raw(weight.codes) == (0x88 if format == "uint4" else 0)).all()
        assert np.isfinite(scale_numbers(weight.scales, format)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_defaults(format):
    weight = quantize(torch.ones(1, 130, 130), format)
    _, own, code_dtypes, scale_dtypes, _ = FORMATS[format]
    assert weight.group == (own or ((128, 128) if "fp8" in format else (1, 128)))
    assert weight.codes.dtype == code_dtypes[0] and weight.scales.dtype == scale_dtypes[0]


@pytest.mark.parametrize("format", FORMATS)
def test_any_strides_and_part_of_the_experts(format):
    w = dense_weight((3, 38, 6)).mT
    weight = quantize(w, format)
    assert memory(weight) == memory(quantize(w.contiguous(), format))       # and twice the same
    assert memory(weight[1:]) == memory(quantize(w[1:], format))


@pytest.mark.parametrize("where", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_not_finite(format, where):
    w = torch.zeros(3, 5, 66)
    w[1, 4, 65] = where
    with pytest.raises(ValueError, match="w must be finite, got infinity or NaN in expert 1"):
        quantize(w, format)


W = torch.ones(2, 3, 34)
BAD = [
    (dict(w=[1.0]), TypeError, r"w must be a float32, float16 or bfloat16 tensor \[E, N, K\], got list"),
    (dict(w=W.double()), TypeError, "w must be a float32, float16 or bfloat16 tensor .* got torch.float64"),
    (dict(w=W[0]), ValueError, r"w must have 3 dimensions \[E, N, K\], got float32\[3, 34\]"),
    (dict(w=W[..., 1:]), ValueError, r"w must have an even K for int4, whose codes lie two in a byte, got float32\[2, 3, 33\]"),
    (dict(format="q4_0"), ValueError, "format must be one of"),
    (dict(format="nvfp4", group=(1, 32)), ValueError, r"group must be \(1, 16\) for nvfp4, got \(1, 32\)"),
    (dict(group=(1, -1)), ValueError, "group must be positive"),
    (dict(scale_dtype=torch.uint8), TypeError,
     "scale_dtype must be torch.float32, torch.float16 or torch.bfloat16 for int4, got torch.uint8"),
    (dict(scale_dtype="float16"), TypeError, "scale_dtype must be .* for int4, got float16"),
    (dict(w=W * 1e6, scale_dtype=torch.float16), ValueError, r"scale_dtype must hold the scales of w, up to 1\.43e\+05, got torch.float16"),
    (dict(symmetric=0), TypeError, "symmetric must be a bool, got int"),
    (dict(format="mxfp8", symmetric=False), ValueError, "symmetric must be True for mxfp8, which has no zeros, got False"),
]


@pytest.mark.parametrize("wrong, error, message", BAD, ids=range(len(BAD)))
def test_wrong_argument(wrong, error, message):
    with pytest.raises(error, match=message):
        quantize(**(dict(w=W, format="int4") | wrong))


def test_weights_that_require_a_gradient():
    w = torch.nn.Parameter(dense_weight((2, 3, 34)))
    weight = quantize(w, "int4", scale_dtype=torch.bfloat16)
    assert not weight.scales.requires_grad and memory(weight) == memory(quantize(w.detach(), "int4", scale_dtype=torch.bfloat16))
