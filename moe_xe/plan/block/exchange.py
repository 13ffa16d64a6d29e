"""How rows travel between ranks: in how many chunks."""
from __future__ import annotations

MAX_CHUNKS = 64
# Rows of each expert, from all ranks: twice what an Arc Pro B60 multiplies (98.5 TFLOP/s) while it reads the expert's weights (456 GB/s), as
# each chunk reads them again. By the cost model that is nearly the best number of chunks (tests/plan/test_expert_parallel.py).
_ROWS_OF_EXPERT = 512
_MOST = 4       # the first chunk's way there and the last one's way back hide behind nothing, and each message has a latency


def preferred_chunks(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """Of one rank's tokens, if the others have as many tokens and experts."""
    if num_local_experts == 0:
        return 1
    return min(max(num_tokens * top_k // (num_local_experts * _ROWS_OF_EXPERT), 1), _MOST)
