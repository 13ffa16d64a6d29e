"""vllm_xpu_kernels' XpuFusedMoe and xpu_fused_moe on moe_xe's kernels; neither vLLM nor its kernels are needed."""
from __future__ import annotations

import torch

from ..ops import checks
from ..ops.block.fused_moe import fused_moe

__all__ = ["XpuFusedMoe", "xpu_fused_moe"]

# vLLM's names -> fused_moe's; only relu2_no_mul has no gate
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "swigluoai": "swiglu_oai", "relu2_no_mul": "relu2"}
_SWIGLUOAI = dict(alpha=1.702, limit=7.0, interleaved=True)     # gates in even columns, ups in odd ones


class XpuFusedMoe:
    """One layer's routed experts, with the constructor and `apply` of vllm_xpu_kernels' class.

    w13: [E, H, 2I], gates first (swigluoai: gates in even columns, ups in odd ones; relu2_no_mul: [E, H, I]). w2: [E, I, H].
      Both bfloat16, float16 or float32, contiguous in either of the last two dimensions.
    w13_scales, w2_scales: None; quantised weights are a ValueError. w13_bias: [E, 2I], w2_bias: [E, H], any float dtype.
    n_experts_per_token: the k of apply's topk_ids. num_experts: this rank's, E.
    activation: "silu", "gelu", "gelu_tanh", "swigluoai" or "relu2_no_mul", or an enum member of such a value.
    ep_rank, ep_size: with ep_size > 1 and no expert_map, this rank has the global experts from ep_rank * E on.
    expert_map: [global experts] int32, a global id's expert on this rank or -1.
    gemm1_clamp_limit: gates are cut at most to it, up values to [-limit, limit]; None or 0 for none (swigluoai: 7).
    activation_situ_beta, activation_situ_linear_beta: accepted for the activation "situ", which is a ValueError.
    autotune: as in `fused_moe`; not an argument of vllm_xpu_kernels' class.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, w13: torch.Tensor, w13_scales: torch.Tensor | None, w13_bias: torch.Tensor | None, w2: torch.Tensor,
                 w2_scales: torch.Tensor | None, w2_bias: torch.Tensor | None, n_experts_per_token: int, activation,
                 num_experts: int, ep_rank: int = 0, ep_size: int = 1, expert_map: torch.Tensor | None = None,
                 gemm1_clamp_limit: float | None = None, activation_situ_beta: float | None = None,
                 activation_situ_linear_beta: float | None = None, *, autotune: bool = False):
        for name, scales in (("w13_scales", w13_scales), ("w2_scales", w2_scales)):
            if scales is not None:
                raise ValueError(f"{name} must be None, got a {type(scales).__name__}: quantised weights are not supported")
        self.activation, self.autotune = _activation(activation), autotune
        gated = self.activation["activation"] != "relu2"
        _check_weights(w13, w2, num_experts, gated)
        _check_bias("w13_bias", w13_bias, [num_experts, w13.shape[2]])
        _check_bias("w2_bias", w2_bias, [num_experts, w2.shape[2]])
        if gemm1_clamp_limit is not None and gemm1_clamp_limit > 0:
            if not gated:
                raise ValueError(f"gemm1_clamp_limit must be None without a gate, got {gemm1_clamp_limit}")
            self.activation["limit"] = float(gemm1_clamp_limit)
        self.w13, self.w13_bias, self.w2, self.w2_bias = w13, w13_bias, w2, w2_bias
        self.n_experts_per_token = n_experts_per_token
        self.expert_map = expert_map
        if not 0 <= ep_rank < ep_size:
            raise ValueError(f"ep_rank must lie in [0, ep_size), got ep_rank = {ep_rank} and ep_size = {ep_size}")
        if expert_map is None and ep_size > 1:
            self.expert_map = torch.full((num_experts * ep_size,), -1, dtype=torch.int32, device=w13.device)
            self.expert_map[ep_rank * num_experts:][:num_experts] = torch.arange(num_experts, dtype=torch.int32)

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              expert_map: torch.Tensor | None = None, a1q_scale: torch.Tensor | None = None) -> None:
        """Writes the weighted sum of every token's experts on this rank to output.

        output, hidden_states: [T, H], the weights' dtype; they may be the same. topk_weights, a float dtype, and topk_ids,
        global ids, int32 or int64: [T, n_experts_per_token]; `moe_xe.route` chooses as vLLM's grouped_topk, which rounds scores
        to the logits' dtype, with rounded_scores=True. expert_map: instead of the constructor's. a1q_scale: None;
        quantised activations are a ValueError.
        """
        if a1q_scale is not None:
            raise ValueError("a1q_scale must be None, got scales: quantised activations are not supported")
        checks.check_tensor("topk_ids", topk_ids, 2, "[T, n_experts_per_token]")
        if topk_ids.shape[1] != self.n_experts_per_token:
            raise ValueError(f"topk_ids must be [T, n_experts_per_token] with n_experts_per_token = "
                             f"{self.n_experts_per_token}, got {list(topk_ids.shape)}")
        checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
        checks.check_tensor("output", output, 2, "[T, H]")
        if output.shape != hidden_states.shape or output.dtype != hidden_states.dtype:
            raise ValueError(f"output must be {checks.shape_of(hidden_states)} as hidden_states, got "
                             f"{checks.shape_of(output)}")
        checks.check_same_device(hidden_states=hidden_states, output=output)
        output.copy_(fused_moe(hidden_states, self.w13, self.w2, topk_weights, topk_ids, b13=self.w13_bias, b2=self.w2_bias,
                               expert_map=self.expert_map if expert_map is None else expert_map, weight_layout="ekn",
                               autotune=self.autotune, **self.activation))


def xpu_fused_moe(hidden_states: torch.Tensor, w13: torch.Tensor, w13_scales: torch.Tensor | None,
                  w13_bias: torch.Tensor | None, w2: torch.Tensor, w2_scales: torch.Tensor | None,
                  w2_bias: torch.Tensor | None, topk_weights: torch.Tensor, topk_ids: torch.Tensor, n_experts_per_token: int,
                  activation, num_experts: int, ep_rank: int = 0, ep_size: int = 1, expert_map: torch.Tensor | None = None,
                  output: torch.Tensor | None = None, is_fp8: bool = False, is_int4: bool = False, is_mxfp4: bool = False,
                  is_mxfp8: bool = False, is_block_fp8: bool = False, gemm1_clamp_limit: float | None = None) -> torch.Tensor:
    """`XpuFusedMoe` as one call: returns output, or a new [T, H]. The arguments are those of the class and its `apply`.

    is_fp8, is_int4, is_mxfp4, is_mxfp8, is_block_fp8: False; quantised weights are a ValueError.
    """
    flags = dict(is_fp8=is_fp8, is_int4=is_int4, is_mxfp4=is_mxfp4, is_mxfp8=is_mxfp8, is_block_fp8=is_block_fp8)
    for name, quantised in flags.items():
        if quantised:
            raise ValueError(f"{name} must be False, got {quantised!r}: quantised weights are not supported")
    experts = XpuFusedMoe(w13, w13_scales, w13_bias, w2, w2_scales, w2_bias, n_experts_per_token, activation, num_experts,
                          ep_rank, ep_size, expert_map, gemm1_clamp_limit)
    if output is None:
        checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    experts.apply(output, hidden_states, topk_weights, topk_ids)
    return output


def _activation(activation) -> dict:
    """fused_moe's arguments for vLLM's activation, a string or an enum member."""
    name = getattr(activation, "value", activation)
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return dict(activation=_ACTIVATIONS[name]) | (_SWIGLUOAI if name == "swigluoai" else {})


def _check_weights(w13, w2, num_experts, gated) -> None:
    for name, w in (("w13", w13), ("w2", w2)):
        checks.check_weight_type(name, w)
    checks.check_tensor("w2", w2, 3, "[E, I, H]")
    _, intermediate_size, hidden_size = w2.shape
    expected = [num_experts, hidden_size, intermediate_size * (2 if gated else 1)]
    checks.check_tensor("w13", w13, 3, "[E, H, 2I]" if gated else "[E, H, I]")
    if list(w13.shape) != expected or w2.shape[0] != num_experts or w13.dtype != w2.dtype:
        raise ValueError(f"w13 must be {str(w2.dtype).removeprefix('torch.')}{expected} for w2 {checks.shape_of(w2)} and "
                         f"num_experts = {num_experts}, got {checks.shape_of(w13)}")


def _check_bias(name, bias, expected) -> None:
    if bias is not None:
        checks.check_tensor(name, bias, 2, "[E, N]")
        checks.check_dtype(name, bias.dtype)
        if list(bias.shape) != expected:
            raise ValueError(f"{name} must be {expected}, got {list(bias.shape)}")
