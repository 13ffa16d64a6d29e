"""Names of quantised weights in checkpoints, and configurations that are not supported."""
from __future__ import annotations

import pytest

from moe_xe.quantized.stored import METHODS, find_stored, method_of


def test_names():
    names = ["a.up_proj.weight", "a.up_proj.weight_scale_inv", "a.norm.weight", "a.experts.gate_up_proj", "a.experts.gate_up_proj_scale_inv"]
    assert find_stored(METHODS["fp8"], names) == {
        "a.up_proj.weight": {"weight_scale_inv": "a.up_proj.weight_scale_inv", "weight": "a.up_proj.weight"},
        "a.experts.gate_up_proj": {"weight_scale_inv": "a.experts.gate_up_proj_scale_inv", "weight": "a.experts.gate_up_proj"}}
    parts = ["qweight", "qzeros", "scales"]
    assert find_stored(METHODS["awq"], [*(f"a.0.{part}" for part in parts), "a.0.bias"]) == {"a.0.weight": {part: f"a.0.{part}" for part in parts}}
    assert find_stored(METHODS["mxfp4"], ["a.down_proj_blocks", "a.down_proj_scales", "a.down_proj_bias"]) == {
        "a.down_proj": {"blocks": "a.down_proj_blocks", "scales": "a.down_proj_scales"}}
    # caches' scales, and scales alone
    assert not find_stored(METHODS["compressed-tensors"], ["a.k_scale", "b.weight_scale", "c.weight"])


def test_methods():
    assert method_of({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}) is METHODS["awq"]
    assert method_of({"quant_method": "auto-round"}) is METHODS["gptq"]
    assert method_of({"quant_method": "compressed-tensors", "format": "mixed-precision", "sparsity_config": {"format": "dense"}, "config_groups": {
        "group_0": {"format": "pack-quantized"}, "group_1": {"format": None}}}) is METHODS["compressed-tensors"]


@pytest.mark.parametrize("config, words", [
    ({"quant_method": "aqlm"}, "quant_method must be one of mxfp4, fp8, gptq, awq, compressed-tensors, modelopt, auto-round, got 'aqlm'"),
    ({}, "quant_method must be one of .*, got None"),
    ({"quant_method": "auto-round", "packing_format": "auto_round"}, "packing_format must be one of auto_round:auto_gptq, .*, got 'auto_round'"),
    ({"quant_method": "awq", "version": "GEMV"}, "version must be 'gemm' for awq, got 'gemv'"),
    ({"quant_method": "awq", "bits": 3}, "bits must be 4 for awq, got 3"),
    ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2' for gptq, got 'marlin'"),
    ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format must be 'pack-quantized' or .*, got 'marlin-24'"),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"format": "marlin-24"}}}, "format must be .*, got 'marlin-24'"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config's format must be 'dense'"),
    ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}, "transform_config must be None for compressed-tensors")])
def test_configurations_that_are_not_supported(config, words):
    with pytest.raises(ValueError, match=words):
        method_of(config)
