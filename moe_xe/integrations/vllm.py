"""vllm_xpu_kernels' XpuFusedMoe and xpu_fused_moe, and experts for vLLM's batched layout, on moe_xe's kernels; neither vLLM nor its
kernels are needed."""
from __future__ import annotations

import torch

from ..ops import checks
from ..ops.block.batched_moe import batched_moe
from ..ops.block.fused_moe import fused_moe
from ..ops.weights import Weight
from ..quantized import QuantizedWeight
from .arguments import check_bias, check_weight, check_weight_shape, described, named

__all__ = ["BatchedExperts", "XpuFusedMoe", "xpu_fused_moe"]

# vLLM's names -> fused_moe's; only relu2_no_mul has no gate
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "swigluoai": "swiglu_oai", "relu2_no_mul": "relu2"}
_SWIGLUOAI = dict(alpha=1.702, limit=7.0, interleaved=True)     # gates in even columns, ups in odd ones


class _Experts:
    """One layer's weights, biases and activation."""

    def __init__(self, w13: Weight, w13_scales: torch.Tensor | None, w13_bias: torch.Tensor | None, w2: Weight,
                 w2_scales: torch.Tensor | None, w2_bias: torch.Tensor | None, activation, num_experts: int,
                 gemm1_clamp_limit: float | None = None, *, autotune: bool = False):
        w13, w2 = (_weight(name, w, scales) for name, w, scales in (("w13", w13, w13_scales), ("w2", w2, w2_scales)))
        self.activation, self.autotune = _activation(activation), autotune
        gated = self.activation["activation"] != "relu2"
        _check_weights(w13, w2, num_experts, gated)
        check_bias("w13_bias", w13_bias, [num_experts, w13.shape[2]])
        check_bias("w2_bias", w2_bias, [num_experts, w2.shape[2]])
        if gemm1_clamp_limit is not None and gemm1_clamp_limit > 0:
            if not gated:
                raise ValueError(f"gemm1_clamp_limit must be None without a gate, got {gemm1_clamp_limit}")
            self.activation["limit"] = float(gemm1_clamp_limit)
        self.w13, self.w13_bias, self.w2, self.w2_bias = w13, w13_bias, w2, w2_bias

    def _options(self) -> dict:
        """Of fused_moe and batched_moe."""
        return dict(b13=self.w13_bias, b2=self.w2_bias, weight_layout="ekn", autotune=self.autotune, **self.activation)


class XpuFusedMoe(_Experts):
    """One layer's routed experts, with the constructor and `apply` of vllm_xpu_kernels' class.

    w13: [E, H, 2I], gates first (swigluoai: gates in even columns, ups in odd ones; relu2_no_mul: [E, H, I]). w2: [E, I, H].
      Both bfloat16, float16 or float32, contiguous in either of the last two dimensions, or quantised: a `QuantizedWeight` of this shape,
      or a tensor with scales. They are read in place, and not changed.
    w13_scales, w2_scales: None, or scales of quantised weights, whose dtypes say the format, as in vllm_xpu_kernels (N and K are a GEMM's,
      2I and H or H and I; e8m0 is uint8 or float8_e8m0fnu):
      uint8 [E, N, K / 2] are int4, 0 to 15 of which 8 is zero, with bfloat16, float16 or float32 scales [E, N, K / g];
      float4_e2m1fn_x2 [E, N, K / 2] are mxfp4 with e8m0 scales [E, N, K / 32];
      float8_e4m3fn or float8_e5m2 [E, K, N] are mxfp8 with e8m0 scales [E, K / 32, N], block FP8 with float32 ones
      [E, ceil(K / 128), ceil(N / 128)], else FP8 with one for each expert, [E].
    w13_bias: [E, 2I], w2_bias: [E, H], any float dtype.
    n_experts_per_token: the k of apply's topk_ids. num_experts: this rank's, E.
    activation: "silu", "gelu", "gelu_tanh", "swigluoai" or "relu2_no_mul", or an enum member of such a value.
    ep_rank, ep_size: with ep_size > 1 and no expert_map, this rank has the global experts from ep_rank * E on.
    expert_map: [global experts] int32, a global id's expert on this rank or -1.
    gemm1_clamp_limit: gates are cut at most to it, up values to [-limit, limit]; None or 0 for none (swigluoai: 7).
    activation_situ_beta, activation_situ_linear_beta: accepted for the activation "situ", which is a ValueError.
    autotune: as in `fused_moe`; not an argument of vllm_xpu_kernels' class.
    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, w13: Weight, w13_scales: torch.Tensor | None, w13_bias: torch.Tensor | None, w2: Weight,
                 w2_scales: torch.Tensor | None, w2_bias: torch.Tensor | None, n_experts_per_token: int, activation,
                 num_experts: int, ep_rank: int = 0, ep_size: int = 1, expert_map: torch.Tensor | None = None,
                 gemm1_clamp_limit: float | None = None, activation_situ_beta: float | None = None,
                 activation_situ_linear_beta: float | None = None, *, autotune: bool = False):
        super().__init__(w13, w13_scales, w13_bias, w2, w2_scales, w2_bias, activation, num_experts, gemm1_clamp_limit, autotune=autotune)
        self.n_experts_per_token = n_experts_per_token
        self.expert_map = expert_map
        if not 0 <= ep_rank < ep_size:
            raise ValueError(f"ep_rank must lie in [0, ep_size), got ep_rank = {ep_rank} and ep_size = {ep_size}")
        if expert_map is None and ep_size > 1:
            self.expert_map = torch.full((num_experts * ep_size,), -1, dtype=torch.int32, device=self.w13.device)
            self.expert_map[ep_rank * num_experts:][:num_experts] = torch.arange(num_experts, dtype=torch.int32)

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
              expert_map: torch.Tensor | None = None, a1q_scale: torch.Tensor | None = None) -> None:
        """Writes the weighted sum of every token's experts on this rank to output.

        output, hidden_states: [T, H], the dtype of weights that are not quantised; they may be the same. topk_weights, a float dtype, and
        topk_ids, global ids, int32 or int64: [T, n_experts_per_token]; `moe_xe.route` chooses as vLLM's grouped_topk, which rounds scores
        to the logits' dtype, with rounded_scores=True. expert_map: instead of the constructor's. a1q_scale: None;
        quantised activations are a ValueError.
        """
        _check_not_quantised(a1q_scale)
        checks.check_tensor("topk_ids", topk_ids, 2, "[T, n_experts_per_token]")
        if topk_ids.shape[1] != self.n_experts_per_token:
            raise ValueError(f"topk_ids must be [T, n_experts_per_token] with n_experts_per_token = "
                             f"{self.n_experts_per_token}, got {list(topk_ids.shape)}")
        _check_output(output, hidden_states, 2, "[T, H]")
        output.copy_(fused_moe(hidden_states, self.w13, self.w2, topk_weights, topk_ids,
                               expert_map=self.expert_map if expert_map is None else expert_map, **self._options()))


class BatchedExperts(_Experts):
    """One layer's routed experts for rows that vLLM's modular kernel has dispatched into its batched layout (BatchedExperts).

    The arguments are those of `XpuFusedMoe` that say nothing of routing: w13 to w2_bias, activation, num_experts, this rank's,
    gemm1_clamp_limit and autotune. Raises as it does.
    """

    def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, expert_num_tokens: torch.Tensor,
              a1q_scale: torch.Tensor | None = None) -> None:
        """Writes each row's output of its expert to output, unweighted: weights and sums are the combining side's.

        output, hidden_states: [E, max_num_tokens, H], the dtype of weights that are not quantised; they share no memory.
        expert_num_tokens: [E] int32 or int64 on their device, as in vLLM's ExpertTokensMetadata; an expert's rows beyond are neither read
        nor written. a1q_scale: as in `XpuFusedMoe.apply`.
        """
        _check_not_quantised(a1q_scale)
        _check_output(output, hidden_states, 3, "[E, max_num_tokens, H]")
        checks.check_counts("expert_num_tokens", expert_num_tokens, self.w13.shape[0], (torch.int32, torch.int64), table=False)
        batched_moe(hidden_states, self.w13, self.w2, expert_num_tokens, out=output, **self._options())


def xpu_fused_moe(hidden_states: torch.Tensor, w13: Weight, w13_scales: torch.Tensor | None,
                  w13_bias: torch.Tensor | None, w2: Weight, w2_scales: torch.Tensor | None,
                  w2_bias: torch.Tensor | None, topk_weights: torch.Tensor, topk_ids: torch.Tensor, n_experts_per_token: int,
                  activation, num_experts: int, ep_rank: int = 0, ep_size: int = 1, expert_map: torch.Tensor | None = None,
                  output: torch.Tensor | None = None, is_fp8: bool = False, is_int4: bool = False, is_mxfp4: bool = False,
                  is_mxfp8: bool = False, is_block_fp8: bool = False, gemm1_clamp_limit: float | None = None) -> torch.Tensor:
    """`XpuFusedMoe` as one call: returns output, or a new [T, H]. The arguments are those of the class and its `apply`.

    is_fp8, is_int4, is_mxfp4, is_mxfp8, is_block_fp8: at most one, and only for such weights. is_mxfp4 says so of uint8 weights, too.
    """
    if is_mxfp4:
        w13, w2 = (w.view(torch.float4_e2m1fn_x2) if getattr(w, "dtype", None) == torch.uint8 else w for w in (w13, w2))
    flags = dict(is_fp8=is_fp8, is_int4=is_int4, is_mxfp4=is_mxfp4, is_mxfp8=is_mxfp8, is_block_fp8=is_block_fp8)
    for name, flag in flags.items():
        if flag and (not isinstance(w13, torch.Tensor) or _format(w13, w13_scales) != name.removeprefix("is_")):
            raise ValueError(f"{name} must be False for w13 {described(w13)} with w13_scales {described(w13_scales)}, got {flag!r}")
    experts = XpuFusedMoe(w13, w13_scales, w13_bias, w2, w2_scales, w2_bias, n_experts_per_token, activation, num_experts,
                          ep_rank, ep_size, expert_map, gemm1_clamp_limit)
    if output is None:
        checks.check_tensor("hidden_states", hidden_states, 2, "[T, H]")
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    experts.apply(output, hidden_states, topk_weights, topk_ids)
    return output


def _check_not_quantised(a1q_scale) -> None:
    if a1q_scale is not None:
        raise ValueError("a1q_scale must be None, got scales: quantised activations are not supported")


def _check_output(output, hidden_states, dims: int, layout: str) -> None:
    checks.check_tensor("hidden_states", hidden_states, dims, layout)
    checks.check_tensor("output", output, dims, layout)
    if output.shape != hidden_states.shape or output.dtype != hidden_states.dtype:
        raise ValueError(f"output must be {checks.shape_of(hidden_states)} as hidden_states, got {checks.shape_of(output)}")
    checks.check_same_device(hidden_states=hidden_states, output=output)


def _activation(activation) -> dict:
    """fused_moe's arguments for vLLM's activation, a string or an enum member."""
    name = getattr(activation, "value", activation)
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    return dict(activation=_ACTIVATIONS[name]) | (_SWIGLUOAI if name == "swigluoai" else {})


def _format(w: torch.Tensor, scales: torch.Tensor | None) -> str | None:
    """vllm_xpu_kernels' name of the format, None of weights that are not quantised."""
    if w.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if scales is not None and scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return "mxfp8"
        return "block_fp8" if scales is not None and scales.dtype == torch.float32 and scales.dim() == 3 else "fp8"
    return {torch.uint8: "int4", torch.float4_e2m1fn_x2: "mxfp4"}.get(w.dtype)


def _weight(name: str, w, scales) -> Weight:
    """Weights as fused_moe takes them, [E, K, N]."""
    if scales is None:
        return w
    for argument, tensor in ((name, w), (f"{name}_scales", scales)):
        checks.check_tensor(argument, tensor, tensor.dim() if isinstance(tensor, torch.Tensor) else 3, "")
    format = _format(w, scales)
    if format is None:
        raise ValueError(f"{name}_scales must be None for {w.dtype} weights, got {checks.shape_of(scales)}")
    with named(name, f"{name}_scales"):
        if format == "fp8":
            return QuantizedWeight.from_fp8(w, scales, "ekn").mT
        if format == "block_fp8":
            return QuantizedWeight.from_fp8_block(w, scales, weight_layout="ekn").mT
        if format == "mxfp8":
            return QuantizedWeight.from_fp8_block(w, scales, (1, 32), "ekn").mT
        if format == "mxfp4":
            return QuantizedWeight.from_compressed_tensors(weight_packed=w.view(torch.uint8), weight_scale=scales).mT
        columns = 2 * w.shape[-1] // max(scales.shape[-1], 1)
        return QuantizedWeight(w, scales, format="uint4", group=(1, columns)).mT


def _check_weights(w13, w2, num_experts, gated) -> None:
    check_weight("w13", w13, "[E, H, 2I]" if gated else "[E, H, I]")
    check_weight("w2", w2, "[E, I, H]")
    _, intermediate_size, hidden_size = w2.shape
    experts = f" and num_experts = {num_experts}"
    check_weight_shape("w13", w13, [num_experts, hidden_size, intermediate_size * (2 if gated else 1)], "w2", w2, experts)
    check_weight_shape("w2", w2, [num_experts, intermediate_size, hidden_size], "w13", w13, experts)
