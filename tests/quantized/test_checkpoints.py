"""Checkpoints' tensors, packed here by the formats' definitions, mean the numbers that they were packed from; what lies as it should is not copied."""
from __future__ import annotations

import pytest
import torch

from moe_xe import QuantizedWeight

from .reference import NUMBERS, dense, e4m3

E, N, K = 3, 24, 96
FP8 = {torch.float8_e4m3fn: NUMBERS["fp8_e4m3"], torch.float8_e5m2: NUMBERS["fp8_e5m2"]}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
floats = pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)


def same(weight: QuantizedWeight, expected: torch.Tensor) -> None:
    """Bit for bit, by torch and by the formats' definitions."""
    computed = weight.dequantize(torch.float64)
    assert weight.shape == expected.shape and torch.equal(computed.nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))
    lying = torch.from_numpy(dense(weight))
    assert torch.equal((lying.mT if weight.transposed else lying).nan_to_num(nan=1e30), expected.nan_to_num(nan=1e30))


def in_place(tensor: torch.Tensor, given: torch.Tensor) -> bool:
    return tensor.data_ptr() == given.data_ptr()


def numbers(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(2**bits, shape)


def scales_of(dtype, *shape: int) -> torch.Tensor:
    return (torch.rand(shape) + 0.1).to(dtype)


def spread(grid: torch.Tensor, rows: int, columns: int, n: int, k: int) -> torch.Tensor:
    """[E, n, k] of groups' values, float64."""
    return torch.tensor([[[grid[e, i // rows, j // columns] for j in range(k)] for i in range(n)] for e in range(len(grid))], dtype=torch.float64)


def words(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32, of each 32 / bits numbers along dim the first in the lowest bits; the last word is filled with zeros."""
    rows = values.movedim(dim, -1)
    per_word = 32 // bits
    packed = torch.zeros(*rows.shape[:-1], -(-rows.shape[-1] // per_word), dtype=torch.int64)
    for i in range(rows.shape[-1]):
        packed[..., i // per_word] |= rows[..., i] << bits * (i % per_word)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim)


def pairs(values: torch.Tensor) -> torch.Tensor:
    return (values[..., ::2] + 16 * values[..., 1::2]).to(torch.uint8)


def table(values: torch.Tensor, of: list) -> torch.Tensor:
    return torch.tensor(of, dtype=torch.float64)[values]


def one_by_one(convert, **tensors) -> QuantizedWeight:
    """Of experts' own tensors, joined."""
    return QuantizedWeight.cat([convert(**{name: tensor[e] if isinstance(tensor, torch.Tensor) else tensor for name, tensor in tensors.items()})
                                for e in range(E)])


# gpt-oss


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_gpt_oss(scale_dtype):
    codes, exponents = numbers(4, E, N, K), numbers(8, E, N, K // 32)
    blocks, scales = pairs(codes).view(E, N, K // 32, 16), exponents.to(torch.uint8).view(scale_dtype)
    powers = table(exponents, [*(2.0 ** (byte - 127) for byte in range(255)), float("nan")])
    weight = QuantizedWeight.from_gpt_oss(blocks, scales)
    same(weight, table(codes, NUMBERS["mxfp4"]) * spread(powers, 1, 32, N, K))
    assert weight.format == "mxfp4" and in_place(weight.codes, blocks) and in_place(weight.scales, scales)
    one = QuantizedWeight.from_gpt_oss(blocks[1], scales[1])
    same(one, weight[1:2].dequantize(torch.float64))


def test_gpt_oss_as_transformers_decodes_it():
    pytest.importorskip("transformers", minversion="5.23")
    from transformers.integrations import mxfp4
    decode = getattr(mxfp4, "_convert_moe_packed_tensors", None)
    if decode is None:
        pytest.skip("this transformers has another decoder")
    blocks, scales = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8), torch.randint(100, 140, (E, N, K // 32), dtype=torch.uint8)
    expected = decode(blocks.clone(), scales.clone(), dtype=torch.bfloat16)     # [E, K, N]
    assert torch.equal(QuantizedWeight.from_gpt_oss(blocks, scales).dequantize(torch.bfloat16).mT, expected)


# FP8


@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("scale_dtype", [*FLOATS, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_block(dtype, scale_dtype, layout):
    codes, block = numbers(8, E, N, K), (16, 40)
    weight = codes.to(torch.uint8).view(dtype)
    scales = scales_of(torch.float32, E, 2, 3).to(scale_dtype)
    expected = table(codes, FP8[dtype]) * spread(scales.double(), *block, N, K)
    if layout == "ekn":
        weight, scales = weight.mT.contiguous(), scales.mT.contiguous()
    made = QuantizedWeight.from_fp8_block(weight, scales, block, layout)
    same(made, expected)
    assert in_place(made.codes, weight) and in_place(made.scales, scales) and made.transposed == (layout == "ekn")
    view = QuantizedWeight.from_fp8_block(weight.mT, scales.mT, block, "ekn" if layout == "enk" else "enk")
    same(view, expected)
    assert in_place(view.codes, weight)
    same(one_by_one(QuantizedWeight.from_fp8_block, weight=weight, weight_scale_inv=scales, block=block, weight_layout=layout), expected)


@pytest.mark.parametrize("layout", ["enk", "ekn"])
@pytest.mark.parametrize("shape", [(E,), (E, 1), (E, 2), (E, 2, 1), (E, N), (E, N, 1), (E, 1, N), (E, 1, 1)], ids=str)
def test_fp8_of_tensors_runs_and_channels(shape, layout):
    codes, scale = numbers(8, E, N, K), scales_of(torch.float32, *shape)
    weight, runs = codes.to(torch.uint8).view(torch.float8_e4m3fn), scale.numel() // E
    expected = table(codes, FP8[weight.dtype]) * spread(scale.view(E, runs, 1).double(), N // runs, K, N, K)
    weight = weight if layout == "enk" else weight.mT.contiguous()
    made = QuantizedWeight.from_fp8(weight, scale, layout)
    same(made, expected)
    assert in_place(made.codes, weight) and in_place(made.scales, scale)
    if len(shape) > 1:
        same(one_by_one(QuantizedWeight.from_fp8, weight=weight, scale=scale, weight_layout=layout), expected)
    same(one_by_one(QuantizedWeight.from_fp8, weight=weight, scale=scale.view(E, -1), weight_layout=layout), expected)


def test_fp8_of_one_expert_and_one_number():
    weight = numbers(8, N, K).to(torch.uint8).view(torch.float8_e5m2)
    for scale in (torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]])):
        same(QuantizedWeight.from_fp8(weight, scale), 2 * weight.double()[None])


def test_parameters_leave_their_gradients():
    weight = torch.nn.Parameter(torch.zeros(E, N, K).to(torch.float8_e4m3fn))
    made = QuantizedWeight.from_fp8(weight, torch.nn.Parameter(torch.ones(E, N, 1)))
    assert not made.codes.requires_grad and not made.scales.requires_grad and in_place(made.codes, weight)


# GPTQ and AWQ


@floats
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_gptq(bits, version, groups, scale_dtype):
    codes, zeros, scales = numbers(bits, E, K, N), numbers(bits, E, groups, N), scales_of(scale_dtype, E, groups, N)
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    group = K // groups
    expected = ((codes - spread(zeros, group, 1, K, N)) * spread(scales.double(), group, 1, K, N)).mT
    tensors = dict(qweight=words(codes, bits, 1), qzeros=words(stored, bits, 2), scales=scales,
                   g_idx=(torch.arange(K) // group).to(torch.int32).expand(E, K), bits=bits, version=version)
    weight = QuantizedWeight.from_gptq(**tensors)
    same(weight, expected)
    assert weight.format == ("uint4" if bits == 4 else "int8") and weight.group == (1, group) and weight.zeros.dtype == scale_dtype
    same(one_by_one(QuantizedWeight.from_gptq, **tensors), expected)


@pytest.mark.parametrize("bits, version, byte", [(4, 1, 0x77), (4, 2, 0x88), (8, 1, 0x7F), (8, 2, 0x80)])
def test_gptq_whose_zeros_are_the_middle(bits, version, byte):
    codes, scales = numbers(bits, E, K, N), scales_of(torch.float16, E, 3, N)
    qweight, qzeros = words(codes, bits, 1), torch.full((E, 3, N * bits // 8), byte, dtype=torch.uint8).view(torch.int32)
    expected = ((codes - 2 ** (bits - 1)) * spread(scales.double(), 32, 1, K, N)).mT
    for zeros in (qzeros, None):
        weight = QuantizedWeight.from_gptq(qweight, zeros, scales, bits=bits, version=version)
        assert weight.zeros is None
        same(weight, expected)
    qzeros[1, 2, 1] += 1        # one that is not
    weight = QuantizedWeight.from_gptq(qweight, qzeros, scales, bits=bits, version=version)
    assert weight.zeros is not None and (weight.zeros != (8 if bits == 4 else 0)).sum() == 1
    middle = one_by_one(QuantizedWeight.from_gptq, qweight=qweight, qzeros=qzeros, scales=scales, bits=bits, version=version)     # only expert 1 has zeros
    assert torch.equal(middle.zeros, weight.zeros)


@floats
def test_awq(scale_dtype):
    order = [0, 2, 4, 6, 1, 3, 5, 7]        # columns of eight, from the lowest nibble on
    codes, zeros, scales = numbers(4, E, K, N), numbers(4, E, 4, N), scales_of(scale_dtype, E, 4, N)
    qweight, qzeros = (words(values.unflatten(-1, (-1, 8))[..., order].flatten(-2), 4, 2) for values in (codes, zeros))
    expected = ((codes - spread(zeros, 24, 1, K, N)) * spread(scales.double(), 24, 1, K, N)).mT
    weight = QuantizedWeight.from_awq(qweight, qzeros, scales)
    same(weight, expected)
    assert weight.format == "uint4" and weight.group == (1, 24)
    same(one_by_one(QuantizedWeight.from_awq, qweight=qweight, qzeros=qzeros, scales=scales), expected)
    assert QuantizedWeight.from_awq(qweight, torch.full_like(qzeros, 0x88888888 - 2**32), scales).zeros is None


# NVFP4


def nvfp4():
    codes, scales = numbers(4, E, N, K), numbers(7, E, N, K // 16).clamp(max=126)
    numbers_ = table(codes, NUMBERS["nvfp4"]) * spread(table(scales, [e4m3(byte) for byte in range(128)]), 1, 16, N, K)
    return pairs(codes), scales.to(torch.uint8).view(torch.float8_e4m3fn), numbers_


def test_modelopt_multiplies_and_compressed_tensors_divides():
    packed, scales, numbers_ = nvfp4()
    factor = torch.tensor([0.3, 0.02, 7.0])
    weight = QuantizedWeight.from_modelopt(packed, scales, factor)
    same(weight, numbers_ * factor.double()[:, None, None])
    assert in_place(weight.codes, packed) and in_place(weight.scales, scales) and in_place(weight.global_scales, factor)
    divided = QuantizedWeight.from_compressed_tensors(weight_packed=packed, weight_scale=scales, weight_global_scale=factor[:, None])
    same(divided, numbers_ * factor.reciprocal().double()[:, None, None])
    torch.testing.assert_close(divided.dequantize(torch.float64), numbers_ / factor.double()[:, None, None], rtol=2**-23, atol=0)
    same(one_by_one(QuantizedWeight.from_modelopt, weight=packed, weight_scale=scales, weight_scale_2=factor), weight.dequantize(torch.float64))


# compressed-tensors

compressed = QuantizedWeight.from_compressed_tensors


@pytest.mark.parametrize("n, k", [(24, 96), (21, 84)])     # whole words of codes, and not
@pytest.mark.parametrize("zero", [None, "packed", "plain"])
@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized(bits, zero, n, k):
    middle, groups = 2 ** (bits - 1), 3
    codes, scales = numbers(bits, E, n, k), scales_of(torch.bfloat16, E, n, groups)
    zeros = numbers(bits, E, n, groups) if zero else torch.full((E, n, groups), middle)
    expected = (codes - spread(zeros, 1, k // groups, n, k)) * spread(scales.double(), 1, k // groups, n, k)
    tensors = dict(weight_packed=words(codes, bits, 2), weight_scale=scales, weight_shape=torch.tensor([[n, k]] * E),
                   weight_zero_point={None: None, "packed": words(zeros, bits, 1), "plain": (zeros - middle).to(torch.int8)}[zero])
    weight = compressed(**tensors)
    same(weight, expected)
    assert (weight.zeros is None) == (zero is None) and in_place(weight.scales, scales)
    assert in_place(weight.codes, tensors["weight_packed"]) == (bits == 4 and k == 96)
    same(one_by_one(compressed, **tensors), expected)
    for g_idx in (torch.full((E, k), -1), (torch.arange(k) // (k // groups)).expand(E, k)):
        same(compressed(**tensors, weight_g_idx=g_idx), expected)


@pytest.mark.parametrize("shape", [(E,), (E, 1), (E, 1, 1), (E, N, 1), (E, N, 3), (E, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_int_and_float_quantized(dtype, shape):
    codes, scales = numbers(8, E, N, K), scales_of(torch.bfloat16, *shape)
    grid = scales.view(E, *((1, 1) if scales.numel() == E else shape[1:])).double()
    group = {1: N, N: 1, 3: 8}[grid.shape[1]], K // grid.shape[2]
    weight = codes.to(torch.uint8).view(dtype)
    expected = table(codes, NUMBERS["int8"] if dtype == torch.int8 else FP8[dtype]) * spread(grid, *group, N, K)
    made = compressed(weight=weight, weight_scale=scales, block=(8, 48))
    same(made, expected)
    assert in_place(made.codes, weight) and in_place(made.scales, scales) and made.group == group
    same(one_by_one(compressed, weight=weight, weight_scale=scales.view(E, -1) if len(shape) == 1 else scales, block=(8, 48)), expected)
    if dtype == torch.int8 and shape == (E, N, 3):
        zeros = torch.randint(-128, 128, shape, dtype=torch.int8)
        same(compressed(weight=weight, weight_scale=scales, weight_zero_point=zeros), expected - (spread(zeros, *group, N, K) * spread(grid, *group, N, K)))
        assert compressed(weight=weight, weight_scale=scales, weight_zero_point=torch.zeros_like(zeros)).zeros is None


def test_powers_of_two():
    exponents, codes = numbers(8, E, N, K // 32) % 40 + 100, numbers(8, E, N, K)
    powers = spread(2.0 ** (exponents - 127.0), 1, 32, N, K)
    mxfp8 = compressed(weight=codes.to(torch.uint8).view(torch.float8_e4m3fn), weight_scale=exponents.to(torch.uint8))
    same(mxfp8, table(codes, FP8[torch.float8_e4m3fn]) * powers)
    mxfp4 = compressed(weight_packed=pairs(codes % 16), weight_scale=exponents.to(torch.uint8).view(torch.float8_e8m0fnu))
    same(mxfp4, table(codes % 16, NUMBERS["mxfp4"]) * powers)
    assert mxfp8.format == "mxfp8" and mxfp4.format == "mxfp4"


# what is wrong

BLOCKS, BLOCK_SCALES = torch.zeros(E, N, 3, 16, dtype=torch.uint8), torch.zeros(E, N, 3, dtype=torch.uint8)
CODES = torch.zeros(E, N, K).to(torch.float8_e4m3fn)
GPTQ = dict(qweight=torch.zeros(E, K // 8, N, dtype=torch.int32), qzeros=torch.zeros(E, 3, N // 8, dtype=torch.int32), scales=torch.ones(E, 3, N))
AWQ = GPTQ | dict(qweight=torch.zeros(E, K, N // 8, dtype=torch.int32))
PACKED = dict(weight_packed=torch.zeros(E, N, K // 8, dtype=torch.int32), weight_scale=torch.ones(E, N, 3), weight_shape=torch.tensor([N, K]))
NVFP4 = dict(weight_packed=torch.zeros(E, N, K // 2, dtype=torch.uint8), weight_scale=torch.ones(E, N, 6).to(torch.float8_e4m3fn),
             weight_global_scale=torch.ones(E))
BAD = [
    ("gpt_oss", dict(blocks=BLOCKS.int(), scales=BLOCK_SCALES), TypeError, "blocks must be torch.uint8, got torch.int32"),
    ("gpt_oss", dict(blocks=BLOCKS[..., :8], scales=BLOCK_SCALES), ValueError, r"blocks must be \[3, 24, 3, 16\] for blocks of 32 codes"),
    ("gpt_oss", dict(blocks=BLOCKS, scales=BLOCK_SCALES[:2]), ValueError, r"scales must be \[3, 24, 3\] for blocks .* got uint8\[2, 24, 3\]"),
    ("gpt_oss", dict(blocks=BLOCKS, scales=BLOCK_SCALES.float()), TypeError, "scales must be .* for mxfp4, got torch.float32"),
    ("gpt_oss", dict(blocks=[1], scales=BLOCK_SCALES), TypeError, r"blocks must be a torch.Tensor \[E, N, K / 32, 16\], got list"),
    ("fp8_block", dict(weight=CODES.float(), weight_scale_inv=torch.ones(E, 1, 1)), TypeError, "weight must be .*e4m3fn or .*e5m2, got torch.float32"),
    ("fp8_block", dict(weight=CODES, weight_scale_inv=torch.ones(E, 2, 1)), ValueError,
     r"weight_scale_inv must be \[3, 1, 1\] for weight \[3, 24, 96\] and block \(128, 128\), got float32\[3, 2, 1\]"),
    ("fp8_block", dict(weight=CODES, weight_scale_inv=torch.ones(E, 1, 1), block=(0, 8)), ValueError, r"block must be positive, got \(0, 8\)"),
    ("fp8_block", dict(weight=CODES, weight_scale_inv=torch.ones(E, 1, 1), weight_layout="nk"), ValueError, "weight_layout must be .* got 'nk'"),
    ("fp8_block", dict(weight=CODES, weight_scale_inv=torch.ones(E, 1, 1).double()), TypeError, "weight_scale_inv must be .* got torch.float64"),
    ("fp8", dict(weight=CODES, scale=2.0), TypeError, "scale must be a torch.Tensor .* got float"),
    ("fp8", dict(weight=CODES, scale=torch.ones(E, 1).to_sparse()), TypeError, "scale must be a dense tensor, got layout torch.sparse_coo"),
    ("fp8", dict(weight=CODES, scale=torch.ones(2)), ValueError, r"scale must be .* with E = 3 and a G that divides N = 24, got float32\[2\]"),
    ("fp8", dict(weight=CODES, scale=torch.ones(E, 7)), ValueError, r"scale must be .* divides N = 24, got float32\[3, 7\]"),
    ("fp8", dict(weight=CODES, scale=torch.ones(E, 2, 3)), ValueError, r"scale must be .* got float32\[3, 2, 3\]"),
    ("fp8", dict(weight=CODES, scale=torch.ones(E).double()), TypeError, "scale must be .* got torch.float64"),
    ("gptq", GPTQ | dict(bits=3), ValueError, "bits must be 4 or 8, got 3"),
    ("gptq", GPTQ | dict(version=3), ValueError, "version must be 1 or 2, got 3"),
    ("gptq", GPTQ | dict(qweight=GPTQ["qweight"].long()), TypeError, "qweight must be torch.int32, got torch.int64"),
    ("gptq", GPTQ | dict(qzeros=GPTQ["qzeros"][:, :2]), ValueError, r"qzeros must be \[3, 3, 3\] for scales \[3, 3, 24\] and 4 bits"),
    ("gptq", GPTQ | dict(scales=torch.ones(E, 5, N)), ValueError, "scales must have a number of groups that divides K = 96"),
    ("gptq", GPTQ | dict(scales=torch.ones(E, 3, N + 1)), ValueError, r"scales must be \[3, 3, 24\] for qweight"),
    ("gptq", GPTQ | dict(scales=torch.ones(E, 3, N).long()), TypeError, "scales must be .* got torch.int64"),
    ("gptq", GPTQ | dict(g_idx=(torch.arange(K).flip(0) // 32).expand(E, K)), ValueError, r"g_idx must be k // 32, got another order: act-order \(desc_act=True\) is not supported"),
    ("gptq", GPTQ | dict(g_idx=torch.zeros(E, 8)), ValueError, r"g_idx must be \[3, 96\] for K = 96"),
    ("awq", AWQ | dict(qzeros=AWQ["qzeros"].float()), TypeError, "qzeros must be torch.int32"),
    ("awq", AWQ | dict(qweight=AWQ["qweight"][:, :95]), ValueError, r"qweight must have an even K, .* got int32\[3, 95, 3\]"),
    ("awq", AWQ | dict(scales=torch.ones(E, 3, 8)), ValueError, r"scales must be \[3, 3, 24\] for qweight \[3, 96, 3\]"),
    ("modelopt", dict(weight=NVFP4["weight_packed"], weight_scale=NVFP4["weight_scale"], weight_scale_2=torch.ones(2)), ValueError,
     r"weight_scale_2 must be \[3\], one for each expert, got float32\[2\]"),
    ("modelopt", dict(weight=NVFP4["weight_packed"], weight_scale=NVFP4["weight_scale"][..., :5], weight_scale_2=torch.ones(3)), ValueError,
     r"weight_scale must be \[3, 24, 6\] for weight \[3, 24, 48\]"),
    ("compressed_tensors", dict(weight_scale=torch.ones(E)), ValueError, "weight_packed or weight must be given, got neither"),
    ("compressed_tensors", PACKED | dict(weight=CODES), ValueError, "weight_packed or weight must be given, got both"),
    ("compressed_tensors", PACKED | dict(weight_shape=None), TypeError, "weight_shape must be given with an int32 weight_packed"),
    ("compressed_tensors", PACKED | dict(weight_shape=torch.tensor([N, 200])), ValueError, "weight_packed must be int32 .* of 4 or 8 bits with weight_shape's K = 200"),
    ("compressed_tensors", PACKED | dict(weight_shape=torch.tensor([N, 95])), ValueError, "weight_shape must have an even K, .* got 95"),
    ("compressed_tensors", PACKED | dict(weight_scale=torch.ones(E, N, 5)), ValueError, "weight_scale must have a number of groups that divides K = 96"),
    ("compressed_tensors", PACKED | dict(weight_zero_point=torch.zeros(E, N, 3, dtype=torch.int32)), ValueError, r"weight_zero_point must be \[3, 3, 3\]"),
    ("compressed_tensors", PACKED | dict(weight_g_idx=torch.zeros(E, K)), ValueError, "weight_g_idx must be k // 32, got another order"),
    ("compressed_tensors", PACKED | dict(weight_packed=CODES), TypeError, "weight_packed must be torch.int32 or torch.uint8, got torch.float8_e4m3fn"),
    ("compressed_tensors", PACKED | dict(weight_global_scale=torch.ones(E)), ValueError, "weight_global_scale must be None with weight_packed torch.int32"),
    ("compressed_tensors", NVFP4 | dict(weight_global_scale=None), TypeError, "weight_global_scale must be a torch.Tensor"),
    ("compressed_tensors", NVFP4 | dict(weight_scale=BLOCK_SCALES), ValueError, "weight_global_scale must be None with scales that are powers of two"),
    ("compressed_tensors", NVFP4 | dict(weight_zero_point=torch.zeros(1)), ValueError, "weight_zero_point must be None with weight_packed torch.uint8"),
    ("compressed_tensors", dict(weight=CODES, weight_scale=torch.ones(E, 2, 2)), ValueError, r"weight_scale must be \[3, 1, 1\] for weight .* and block \(128, 128\)"),
    ("compressed_tensors", dict(weight=CODES, weight_scale=torch.ones(E), weight_zero_point=torch.zeros(1)), ValueError, "weight_zero_point must be None"),
]


@pytest.mark.parametrize("source, arguments, error, message", BAD, ids=range(len(BAD)))
def test_wrong_argument(source, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        getattr(QuantizedWeight, f"from_{source}")(**arguments)
