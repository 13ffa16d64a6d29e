"""The block with low-rank adapters."""
