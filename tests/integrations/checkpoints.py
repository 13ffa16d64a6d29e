"""Small quantised checkpoints in each format's own layout, packed here by the formats' definitions, and the dense ones that they are."""
from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
ATTENTION = re.compile(r"\.self_attn\.[qkvo]_proj\.weight$")
GROUP, BLOCK = 32, (16, 32)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words along a dimension, the first number in the lowest bits."""
    groups = numbers.long().movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    packed = (groups << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim).contiguous()


def groups_of(w: torch.Tensor, size: int = GROUP) -> torch.Tensor:
    return w.unflatten(-1, (-1, size))


def integers(w: torch.Tensor, bits: int, symmetric: bool):
    """Unsigned codes [N, K], zeros and scales [N, K / GROUP], and the numbers that they are."""
    low, high = groups_of(w).amin(-1).clamp(max=0), groups_of(w).amax(-1).clamp(min=0)
    middle, last = 2 ** (bits - 1), 2**bits - 1
    scales = (torch.maximum(-low, high) / (middle - 1) if symmetric else (high - low) / last).half()
    zeros = torch.full_like(scales, middle) if symmetric else (-low / scales).round().clamp(0, last)
    codes = (groups_of(w) / scales[..., None] + zeros[..., None]).round().clamp(0, last)
    return codes.flatten(1), zeros, scales, ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)


def gptq(w, bits=4, version=1, symmetric=False):
    codes, zeros, scales, dense = integers(w, bits, symmetric)
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    return {"qweight": words(codes.T, bits, 0), "qzeros": words(stored.T, bits, 1), "scales": scales.T.contiguous(),
            "g_idx": (torch.arange(w.shape[1]) // GROUP).int()}, dense


def awq(w):
    codes, zeros, scales, dense = integers(w, 4, False)

    def packed(numbers):
        return words(numbers.T.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1), 4, 1)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T.contiguous()}, dense


def packed_int(w, symmetric=True):
    codes, zeros, scales, dense = integers(w, 4, symmetric)
    tensors = {"weight_packed": words(codes, 4, 1), "weight_scale": scales, "weight_shape": torch.tensor(w.shape)}
    return tensors | ({} if symmetric else {"weight_zero_point": words(zeros, 4, 0)}), dense


def e2m1(w):
    """Codes [N, K] and exponents [N, K / 32]."""
    exponents = groups_of(w).abs().amax(-1).log2().floor().clamp(-100, 100).int() - 2
    codes = (groups_of(w)[..., None] / exponents[..., None, None].float().exp2() - E2M1).abs().argmin(-1)
    return codes.flatten(1), exponents, (E2M1[codes] * exponents[..., None].float().exp2()).flatten(1)


def bytes_of(codes):
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def packed_mxfp4(w):
    codes, exponents, dense = e2m1(w)
    return {"weight_packed": bytes_of(codes), "weight_scale": (exponents + 127).to(torch.uint8)}, dense


def fp8_channel(w):
    scales = w.abs().amax(1, keepdim=True) / 448
    codes = (w / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def fp8_block(w, name="weight_scale_inv"):
    blocks = w.unflatten(0, (-1, BLOCK[0])).unflatten(2, (-1, BLOCK[1]))
    scales = blocks.abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    codes = (w / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales}, codes.float() * spread


def fp8_tensor(w, name="weight_scale_inv"):
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scale}, codes.float() * scale


def int8_channel(w):
    scales = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scales).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def nvfp4(w, multiplies=True):
    """Global scales are powers of two, so that those of gate and up are each other's multiples."""
    factor = torch.tensor(2.0**-11)
    scales = (groups_of(w, 16).abs().amax(-1) / 6 / factor).clamp(2**-6, 448).to(torch.float8_e4m3fn)
    step = scales.float() * factor
    codes = (groups_of(w, 16)[..., None] / step[..., None, None] - E2M1).abs().argmin(-1)
    dense, packed = (E2M1[codes] * step[..., None]).flatten(1), bytes_of(codes.flatten(1))
    if multiplies:
        return {"weight": packed, "weight_scale": scales, "weight_scale_2": factor, "input_scale": torch.tensor(1.0)}, dense
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": 1 / factor[None], "input_global_scale": torch.ones(1)}, dense


def _compressed(format, **weights):
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"], "quantization_status": "compressed",
            "config_groups": {"group_0": group}}


# by name: quantization_config, tensors and dense numbers of a weight, and which weights
FORMATS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}, gptq, "all"),
    "gptq_v2_8bit": ({"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": False, "sym": False, "checkpoint_format": "gptq_v2"},
                     lambda w: gptq(w, 8, 2), "experts"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "packing_format": "auto_round:auto_gptq"},
                   lambda w: gptq(w, symmetric=True), "experts"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq, "all"),
    "int4": (_compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP), packed_int, "all"),
    "int4_zeros": (_compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
                   lambda w: packed_int(w, False), "experts"),
    "float8": (_compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_channel, "all"),
    "mxfp4": (_compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), packed_mxfp4, "experts"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]},
            fp8_block, "all"),
    "auto-round_awq": ({"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"}, awq, "experts"),
    "int8": (_compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8_channel, "all"),
    "float8_block": (_compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=list(BLOCK)),
                     lambda w: fp8_block(w, "weight_scale"), "all"),
    "modelopt_fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, lambda w: fp8_tensor(w, "weight_scale"), "all"),
    "fp8_tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}, fp8_tensor, "all"),
    "nvfp4": (_compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
              lambda w: nvfp4(w, False), "experts"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4, "all"),
    "fp8_experts": ({"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic",
                     "modules_to_not_convert": ["lm_head", r"model\.layers\.\d+\.self_attn", r"model\.layers\.\d+\.mlp\.gate"]},
                    fp8_block, "experts"),
}


def write(folder: Path, dense_folder: Path, model, name: str) -> None:
    """A model's quantised checkpoint, and the same as dense float32."""
    config, quantise, which = FORMATS[name]
    model.save_pretrained(dense_folder)
    tensors = load_file(dense_folder / "model.safetensors")
    quantised, dense = {}, {}
    for key, w in tensors.items():
        if EXPERT.search(key) or (which == "all" and ATTENTION.search(key)):
            parts, dense[key] = quantise(w)
            quantised.update({f"{key.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()})
        else:
            quantised[key] = dense[key] = w
    _save(folder, quantised, json.loads((dense_folder / "config.json").read_text()) | {"quantization_config": config})
    save_file(dense, dense_folder / "model.safetensors", metadata={"format": "pt"})


def write_gpt_oss(folder: Path, dense_folder: Path, model) -> None:
    """gpt-oss' own: blocks [E, N, K / 32, 16] of weights that dense checkpoints have as [E, K, N]."""
    model.save_pretrained(dense_folder)
    quantised, dense = {}, {}
    for key, w in load_file(dense_folder / "model.safetensors").items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            codes, exponents, numbers = zip(*map(e2m1, w.mT))
            quantised[f"{key}_blocks"] = torch.stack([groups_of(bytes_of(c), 16) for c in codes])
            quantised[f"{key}_scales"] = (torch.stack(exponents) + 127).to(torch.uint8)
            dense[key] = torch.stack(numbers).mT.contiguous()
        else:
            quantised[key] = dense[key] = w
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    _save(folder, quantised, json.loads((dense_folder / "config.json").read_text()) | {"quantization_config": config})
    save_file(dense, dense_folder / "model.safetensors", metadata={"format": "pt"})


def _save(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    """In two shards, with an index."""
    folder.mkdir()
    names = sorted(tensors)
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
        key: file for file, keys in shards.items() for key in keys}}))
    (folder / "config.json").write_text(json.dumps(config))


def write_random_gptq(folder: Path, model) -> None:
    """Of any size: random codes, and never a dense copy of the experts."""
    def random(k, n):
        def bits(*shape):
            return torch.randint(-2**31, 2**31, shape).int()

        return {"qweight": bits(k // 8, n), "qzeros": bits(k // GROUP, n // 8), "scales": torch.rand(k // GROUP, n).half(),
                "g_idx": (torch.arange(k) // GROUP).int()}

    quantised = {}
    for name, w in model.state_dict().items():
        if name.endswith("experts.down_proj"):
            quantised.update({f"{name.removesuffix('down_proj')}{e}.down_proj.{part}": tensor
                              for e in range(len(w)) for part, tensor in random(w.shape[2], w.shape[1]).items()})
        elif name.endswith("experts.gate_up_proj"):
            quantised.update({f"{name.removesuffix('gate_up_proj')}{e}.{half}_proj.{part}": tensor for e in range(len(w))
                              for half in ("gate", "up") for part, tensor in random(w.shape[2], w.shape[1] // 2).items()})
        else:
            quantised[name] = w
    _save(folder, quantised, model.config.to_dict() | {"quantization_config": FORMATS["gptq"][0]})
