"""What a quantised weight is, by the formats' definitions, in float64; and weights of random bytes."""
import math

import numpy as np
import torch

import moe_xe

BYTES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E8M0 = (torch.float8_e8m0fnu, torch.uint8)
FORMATS = {     # bits of a code, (groups), dtypes of codes, dtypes of scales, zeros
    "mxfp4": (4, (1, 32), (torch.uint8,), E8M0, False),
    "nvfp4": (4, (1, 16), (torch.uint8,), (torch.float8_e4m3fn, torch.uint8), False),
    "int4": (4, None, (torch.uint8,), FLOATS, True),
    "uint4": (4, None, (torch.uint8,), FLOATS, True),
    "int8": (8, None, (torch.int8,), FLOATS, True),
    "fp8_e4m3": (8, None, (torch.float8_e4m3fn, torch.uint8), (*FLOATS, *E8M0), False),
    "fp8_e5m2": (8, None, (torch.float8_e5m2, torch.uint8), (*FLOATS, *E8M0), False),
    "mxfp8": (8, (1, 32), (torch.float8_e4m3fn, torch.uint8), E8M0, False),
}


def small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Sign, exponent, mantissa; exponent 0 has no hidden one."""
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    size = math.ldexp(mantissa, 1 - bias) if exponent == 0 else math.ldexp(1 + mantissa, exponent - bias)
    return -size if code >> exponent_bits + mantissa_bits else size


def e4m3(code: int) -> float:
    return math.nan if code & 0x7F == 0x7F else small_float(code, 4, 3, 7)


def e5m2(code: int) -> float:
    if code & 0x7C != 0x7C:
        return small_float(code, 5, 2, 15)
    return math.nan if code & 3 else math.inf * (-1 if code & 0x80 else 1)


NUMBERS = {
    "mxfp4": [small_float(code, 2, 1, 1) for code in range(16)],
    "int4": [code - 16 * (code > 7) for code in range(16)],
    "uint4": list(range(16)),
    "int8": [code - 256 * (code > 127) for code in range(256)],
    "fp8_e4m3": [e4m3(code) for code in range(256)],
    "fp8_e5m2": [e5m2(code) for code in range(256)],
}
NUMBERS["nvfp4"], NUMBERS["mxfp8"] = NUMBERS["mxfp4"], NUMBERS["fp8_e4m3"]


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def scale_numbers(scales: torch.Tensor, format: str) -> np.ndarray:
    if scales.dtype in FLOATS:
        return scales.double().numpy()
    if format == "nvfp4":
        return np.array([e4m3(byte) for byte in range(256)])[raw(scales)]
    return np.array([*(2.0 ** (byte - 127) for byte in range(255)), math.nan])[raw(scales)]


def code_numbers(codes: torch.Tensor, format: str) -> np.ndarray:
    """[E, N, K]."""
    bits = raw(codes)
    if FORMATS[format][0] == 4:
        bits = np.stack((bits & 15, bits >> 4), -1).reshape(*bits.shape[:2], 2 * bits.shape[2])
    return np.array(NUMBERS[format], float)[bits]


def spread(grid: np.ndarray, group: tuple[int, int], n: int, k: int) -> np.ndarray:
    return grid.repeat(group[0], 1)[:, :n].repeat(group[1], 2)[:, :, :k]


def parts(weight: moe_xe.QuantizedWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of codes, zeros, scales with global ones, each [E, N, K]."""
    numbers = code_numbers(weight.codes, weight.format)
    n, k = numbers.shape[1:]
    scales = spread(scale_numbers(weight.scales, weight.format), weight.group, n, k)
    if weight.global_scales is not None:
        scales = scales * weight.global_scales.double().numpy()[:, None, None]
    if weight.zeros is None:
        return numbers, np.full_like(numbers, 8.0 if weight.format == "uint4" else 0.0), scales
    return numbers, spread(weight.zeros.double().numpy(), weight.group, n, k), scales


def dense(weight: moe_xe.QuantizedWeight) -> np.ndarray:
    """[E, N, K], as the codes lie."""
    numbers, zeros, scales = parts(weight)
    with np.errstate(invalid="ignore", over="ignore"):
        return (numbers - zeros) * scales


def random_weight(format: str, shape=(2, 5, 70), group=None, scale_dtype=None, zeros=False, global_scales=False,
                  code_dtype=None, seed=0) -> moe_xe.QuantizedWeight:
    """Of random bytes: all codes, NaN, too. Scales are positive floats, or any bytes. Zeros are integers."""
    bits, own, code_dtypes, scale_dtypes, _ = FORMATS[format]
    (num_experts, n, k), generator = shape, torch.Generator().manual_seed(seed)
    rows, columns = group = group or own or (1, 32)

    def random_bytes(dtype, *sizes):
        return torch.randint(256, sizes, generator=generator, dtype=torch.uint8).view(dtype)

    grid, dtype = (num_experts, -(-n // rows), -(-k // columns)), scale_dtype or scale_dtypes[0]
    scales = random_bytes(dtype, *grid) if dtype in BYTES else (torch.rand(grid, generator=generator) + 0.01).to(dtype)
    return moe_xe.QuantizedWeight(
        random_bytes(code_dtype or code_dtypes[0], num_experts, n, k * bits // 8), scales,
        torch.randint(-8, 16, grid, generator=generator).to(dtype) if zeros else None,
        torch.rand(num_experts, generator=generator) if global_scales else None, format, group)
