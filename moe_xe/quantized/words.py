"""Codes of 4 or 8 bits that checkpoints keep in int32 words."""
from __future__ import annotations

import torch

from .encoding import pack_pairs

__all__ = ["awq_codes", "awq_numbers", "bytes_of_words", "numbers_of_words"]

# Of eight columns, the nibble of a word that AWQ puts each into.
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


def bytes_of_words(words: torch.Tensor) -> torch.Tensor:
    """int32 [.., n] -> uint8 [.., 4 n], the lowest bits first; no copy of contiguous words."""
    return words.flatten().view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])     # a dimension of 1 may have any stride


def numbers_of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers in int32 [.., n], the lowest bits first, as uint8 [.., 32 n / bits]."""
    numbers = bytes_of_words(words)
    return numbers if bits == 8 else torch.stack((numbers & 15, numbers >> 4), -1).flatten(-2)


def awq_numbers(words: torch.Tensor) -> torch.Tensor:
    """The numbers of AWQ's int32 [.., n], as uint8 [.., 8 n]."""
    return numbers_of_words(words, 4).unflatten(-1, (-1, 8))[..., _AWQ_NIBBLES].flatten(-2)


def awq_codes(words: torch.Tensor) -> torch.Tensor:
    """AWQ's int32 [E, K, N / 8] -> uint8 [E, N, K / 2]; one expert after the other: little memory is needed besides."""
    num_experts, k, columns = words.shape
    codes = words.new_empty((num_experts, 8 * columns, k // 2), dtype=torch.uint8)
    for expert, its_words in zip(codes, words):
        expert.copy_(pack_pairs(awq_numbers(its_words).T))
    return codes
