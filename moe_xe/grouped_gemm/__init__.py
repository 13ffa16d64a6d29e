"""Grouped GEMM with its permutations fused (interface), and MoE blocks built on it (reference)."""
