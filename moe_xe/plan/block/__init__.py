"""The block's small launches around the GEMMs: routing, token sort, combine, activation."""
