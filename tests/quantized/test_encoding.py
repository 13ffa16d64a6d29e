import numpy as np
import pytest
import torch

from moe_xe.plan.formats import FORMATS
from moe_xe.quantized.encoding import code_range, decode, encode

from .reference import NUMBERS

CODES = {scheme.codes: NUMBERS[name] for name, scheme in FORMATS.items()}


def encoded(codes, numbers) -> list[int]:
    """The code of each number, one beside a zero."""
    numbers = torch.tensor(numbers, dtype=torch.float32)
    bits = encode(codes, torch.stack([numbers, torch.zeros_like(numbers)], 1)).view(torch.uint8)
    return bits[:, 0].tolist()


@pytest.mark.parametrize("codes", CODES)
def test_every_code_is_its_number_and_back(codes):
    numbers = np.array(CODES[codes])
    bits = torch.arange(len(numbers), dtype=torch.uint8)[:, None]
    assert np.array_equal(decode(codes, bits, torch.float64)[:, 0].numpy(), numbers, equal_nan=True)
    finite = np.isfinite(numbers)
    assert encoded(codes, numbers[finite]) == np.flatnonzero(finite).tolist()
    assert code_range(codes) == (numbers[finite].min(), numbers[finite].max())


@pytest.mark.parametrize("codes", CODES)
def test_nearest_code_ties_to_even(codes):
    numbers = np.array(CODES[codes])
    order = [code for code in np.argsort(numbers, kind="stable") if np.isfinite(numbers[code])]
    for lower, upper in zip(order, order[1:]):
        middle = np.float32(numbers[lower] + numbers[upper]) / 2
        if numbers[lower] == numbers[upper]:        # zeros of both signs
            continue
        even = lower if lower % 2 == 0 else upper
        below, above = np.nextafter(middle, np.float32(-1e9)), np.nextafter(middle, np.float32(1e9))
        wanted = numbers[[lower, even, upper]]
        assert np.array_equal(numbers[encoded(codes, [below, middle, above])], wanted), (lower, upper)


@pytest.mark.parametrize("codes", CODES)
def test_past_the_ends_is_the_last_code(codes):
    numbers, (low, high) = np.array(CODES[codes]), code_range(codes)
    assert numbers[encoded(codes, [1.01 * low, -3e38, 1.07 * high, 3e38])].tolist() == [low, low, high, high]
