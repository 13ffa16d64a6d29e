"""Quantised weights as adapters' tests need them: finite, and as large as a trained model's."""
from __future__ import annotations

import numpy as np
import torch

from tests.quantized.reference import FLOATS, code_numbers, dense, random_weight

EXPERTS, HIDDEN, INTERMEDIATE = 3, 140, 70      # whole groups of no format
TOP_K, TOKENS = 2, 7


def small_weight(format, n, k, group, scale_dtype=torch.float32, zeros=False, num_experts=EXPERTS):
    """A `QuantizedWeight` [E, N, K] of all finite codes, its numbers about K^-0.5."""
    weight = random_weight(format, (num_experts, n, k), group, scale_dtype, zeros, seed=int(torch.randint(2**31, ())))
    if format in ("fp8_e4m3", "fp8_e5m2", "mxfp8"):
        codes = weight.codes.view(torch.uint8)
        codes[(codes & 0x7F) >= (0x7F if format != "fp8_e5m2" else 0x7C)] = 1
    size = k**-0.5 / np.sqrt(np.square(code_numbers(weight.codes, format)).mean())
    if weight.scales.dtype in FLOATS:
        weight.scales.mul_(size)
    else:
        weight.scales.copy_((127 + int(np.floor(np.log2(size))) + torch.randint(2, weight.scales.shape)).to(torch.uint8).view(scale_dtype))
    return weight


def numbers_of(weight) -> torch.Tensor:
    """[E, N, K], float64."""
    return torch.from_numpy(dense(weight))


def routing(num_experts=EXPERTS):
    return torch.rand(TOKENS, TOP_K), torch.rand(TOKENS, num_experts).topk(TOP_K).indices.int()
