"""The grouped GEMM: its configurations, and the choice among them."""
