"""Reference implementations: moe_ops with torch's own operations, moe_block with moe_xe's grouped GEMM."""
