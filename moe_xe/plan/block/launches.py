"""How many kernels a block is."""
from __future__ import annotations

ONE_LAUNCH_PAIRS = 0      # up to so many pairs of a token and an expert all of it is one launch; 0: never


def block_launches(num_tokens: int, slots: int) -> int:
    """Of a block with all fusions, without its routing: sort, two GEMMs and the sum over slots, which one slot does not need."""
    if num_tokens * slots <= ONE_LAUNCH_PAIRS:
        return 1
    return 3 + (slots > 1)
