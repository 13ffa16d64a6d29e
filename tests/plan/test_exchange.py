"""In how many chunks rows travel."""
from moe_xe.plan.block.exchange import MAX_CHUNKS, preferred_chunks


def test_chunks_have_enough_rows_for_each_expert():
    assert [preferred_chunks(tokens, 8, 32) for tokens in (0, 1, 2048, 4095, 4096, 6144, 8192, 2**20)] == [1, 1, 1, 1, 2, 3, 4, 4]
    assert preferred_chunks(2**20, 1, 0) == 1 and preferred_chunks(2**20, 32, 1) <= MAX_CHUNKS
