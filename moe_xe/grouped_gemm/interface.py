"""The grouped GEMM of an MoE MLP, permutations included: m_sizes, permute_x, permute_y, fuse_mul_post."""
from __future__ import annotations

import torch

from ..ops import checks
from ..ops.autocast import autocast
from ..ops.gemm.grouped_gemm import dispatch, grouped_gemm as expert_order_gemm, validate
from ..ops.gemm.grouped_outer import OuterCall, dispatch as dispatch_outer, source_rows, validate as validate_outer, with_zero_row
from ..plan.choice.block_config import GemmConfigs
from ..plan.choice.choice import Choice
from ..plan.gemm.config import TileConfig
from ..plan.outer.config import OuterConfig

__all__ = ["grouped_gemm", "grouped_gemm_dW", "grouped_gemm_dX", "grouped_gemm_forward"]


def grouped_gemm(X: torch.Tensor, W: torch.Tensor, m_sizes: torch.Tensor, topk: int,
                 gather_indices: torch.Tensor | None = None, permute_x: bool = False, permute_y: bool = False,
                 topk_weights: torch.Tensor | None = None, fuse_mul_post: bool = False,
                 kernel_config_fwd: TileConfig | None = None, kernel_config_bwd_dX: TileConfig | None = None,
                 kernel_config_bwd_dW: OuterConfig | None = None, autotune: bool = False,
                 is_first_gemm: bool = True) -> torch.Tensor:
    """One of the two grouped GEMMs of an MoE MLP: `grouped_gemm_forward` with the arguments that a training step has.

    kernel_config_bwd_dX, kernel_config_bwd_dW: of the gradients' GEMMs: a TileConfig and an OuterConfig (moe_xe.plan.outer.config).
    is_first_gemm: says which of the two GEMMs the caller means. The permutations already determine what is computed, so
    that it changes nothing. The rest, the result and the errors: see `grouped_gemm_forward`. Differentiable in X, W and,
    with fuse_mul_post, topk_weights (whose gradient computes the products again, without them).
    """
    X, W = autocast(X, W)
    configs = {"kernel_config_fwd": kernel_config_fwd, "kernel_config_bwd_dX": kernel_config_bwd_dX,
               "kernel_config_bwd_dW": kernel_config_bwd_dW}
    _check(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights, fuse_mul_post, configs, autotune)
    given = any(config is not None for config in configs.values())
    return _permuted_gemm(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights if fuse_mul_post else None,
                          GemmConfigs(*configs.values()) if given else None, autotune)


def grouped_gemm_forward(X: torch.Tensor, W: torch.Tensor, m_sizes: torch.Tensor, topk: int,
                         gather_indices: torch.Tensor | None = None, permute_x: bool = False, permute_y: bool = False,
                         topk_weights: torch.Tensor | None = None, fuse_mul_post: bool = False,
                         kernel_config_fwd: TileConfig | None = None, autotune: bool = False) -> torch.Tensor:
    """Row i of the sorted rows (tokens grouped by expert) times its expert's weights, transposed.

    X: [total_rows, K], sorted by expert; with permute_x [tokens, K] in token order, total_rows = tokens * topk; bfloat16,
      float16 or float32. W: [E, N, K], X's dtype; a transposed view of [E, K, N] is read in place.
    m_sizes: [E], int32 or int64, rows of each expert. Rows beyond their sum are not computed.
    gather_indices: [total_rows], int32 or int64: entry i of the sorted rows is entry gather_indices[i] of the flattened
      [tokens, topk] choices, so that its token is gather_indices[i] // topk. Needed where something is permuted. What an index
      outside does is said in moe_xe.grouped_gemm.
    permute_x: sorted row i is ``X[gather_indices[i] // topk]`` (an MLP's first GEMM).
    permute_y: the product of sorted row i is row gather_indices[i] of the result (its second GEMM).
    topk_weights: [tokens, topk] or [tokens * topk], a float dtype. fuse_mul_post: with permute_y, row r of the result is
      multiplied by the r-th of them, in float32, before it is rounded.
    kernel_config_fwd: a TileConfig of the device's family (moe_xe.plan.gemm.config), or None for moe_xe's choice.
    autotune: as in moe_xe.grouped_gemm; excludes kernel configurations.

    Returns [total_rows, N] in X's dtype: in token order with permute_y, else sorted by expert. Raises TypeError or
    ValueError naming the argument, ValueError for permute_x with permute_y.
    """
    X, W = autocast(X, W)
    _check(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights, fuse_mul_post,
           {"kernel_config_fwd": kernel_config_fwd}, autotune)
    return _permuted_gemm(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights if fuse_mul_post else None,
                          kernel_config_fwd, autotune)


def _permuted_gemm(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights, config, autotune) -> torch.Tensor:
    indices = _as_int32(gather_indices)
    options = dict(config=config, autotune=autotune)
    if not permute_y:
        return expert_order_gemm(X, W, m_sizes, gather_indices=indices if permute_x else None, gather_divisor=topk, **options)
    scales = None if topk_weights is None else topk_weights.flatten().float()[source_rows(indices, 1, topk_weights.numel())]
    return expert_order_gemm(X, W, m_sizes, scatter_indices=indices, row_scales=scales, **options)


def _as_int32(indices: torch.Tensor | None) -> torch.Tensor | None:
    """What is outside stays outside."""
    if indices is None or indices.dtype == torch.int32:
        return indices
    return indices.clamp(-1, 2**31 - 1).to(torch.int32)


def grouped_gemm_dX(dY: torch.Tensor, W: torch.Tensor, m_sizes: torch.Tensor, topk: int,
                    gather_indices: torch.Tensor | None = None, permute_x: bool = False, permute_y: bool = False,
                    kernel_config_bwd_dX: TileConfig | None = None) -> torch.Tensor:
    """The gradient of X in `grouped_gemm_forward`, given that of its result; arguments as there.

    dY: [total_rows, N], sorted by expert, or in token order with permute_y (then its rows are gathered). Returns
    [total_rows, K] in dY's dtype: sorted by expert, or with permute_x in token order, one row for each of a token's topk
    choices (``.view(tokens, topk, K).sum(1)`` is X's gradient). Rows beyond the sum of m_sizes are zero.
    """
    dY, W = autocast(dY, W)
    _check(dY, W.transpose(1, 2) if isinstance(W, torch.Tensor) and W.dim() == 3 else W, m_sizes, topk, gather_indices,
           permute_x, permute_y, None, False, {"kernel_config_bwd_dX": kernel_config_bwd_dX}, False, x_name="dY",
           x_layout="[total_rows, N]")
    indices = _as_int32(gather_indices)
    call = validate(with_zero_row(dY) if permute_y else dY, W.transpose(1, 2), m_sizes, None, indices if permute_y else None, None,
                    None, "dynamic", rows_dtypes=(m_sizes.dtype,), scatter_indices=indices if permute_x else None,
                    choice=Choice(kernel_config_bwd_dX))
    return dispatch(call, None, None, zeros=True)


def grouped_gemm_dW(X: torch.Tensor, dY: torch.Tensor, m_sizes: torch.Tensor, topk: int,
                    gather_indices: torch.Tensor | None = None, permute_x: bool = False, permute_y: bool = False,
                    kernel_config_bwd_dW: OuterConfig | None = None) -> torch.Tensor:
    """The gradient of W in `grouped_gemm_forward`: [E, N, K] in X's dtype; arguments as there and in `grouped_gemm_dX`."""
    X, dY = autocast(X, dY)
    _check_counts_and_flags(topk, permute_x=permute_x, permute_y=permute_y)
    checks.check_tensor("X", X, 2, "[tokens, K]" if permute_x else "[total_rows, K]")
    checks.check_tensor("dY", dY, 2, "[total_rows, N]")
    total_rows = X.shape[0] * topk if permute_x else X.shape[0]
    _check_permutations(gather_indices, permute_x, permute_y, total_rows)
    if dY.shape[0] != total_rows:
        raise ValueError(f"dY must have a row for each of the {total_rows} total_rows, got {checks.shape_of(dY)}")
    _check_configs({"kernel_config_bwd_dW": kernel_config_bwd_dW}, False)
    checks.check_same_device(X=X, gather_indices=gather_indices)
    indices = _as_int32(gather_indices)
    call = OuterCall(with_zero_row(dY) if permute_y else dY, X, m_sizes, indices if permute_y else None,
                     indices if permute_x else None, topk if permute_x else 1, choice=Choice(kernel_config_bwd_dW))
    validate_outer(call, None, None, False, left_name="dY", right_name="X", rows_name="m_sizes")
    return dispatch_outer(call, None, None, False)


def _check_counts_and_flags(topk, **flags) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk must be a positive int, got {topk!r}")


def _check_permutations(gather_indices, permute_x, permute_y, total_rows) -> None:
    if permute_x and permute_y:
        raise ValueError("permute_x and permute_y exclude each other (an MLP's first GEMM permutes X, its second permutes "
                         "Y), got both")
    if gather_indices is not None:
        checks.check_indices("gather_indices", gather_indices, total_rows, "total_rows", (torch.int32, torch.int64))
    elif permute_x or permute_y:
        raise ValueError(f"gather_indices must be given for {'permute_x' if permute_x else 'permute_y'}, got None")


def _check_configs(configs: dict[str, object], autotune: bool) -> None:
    for name, config in configs.items():
        kind = OuterConfig if name == "kernel_config_bwd_dW" else TileConfig
        if config is not None and not isinstance(config, kind):
            raise TypeError(f"{name} must be a {kind.__module__}.{kind.__name__} or None, got {type(config).__name__}")
        if config is not None and autotune:
            raise ValueError(f"{name} must be None with autotune=True, got {config}")


def _check(X, W, m_sizes, topk, gather_indices, permute_x, permute_y, topk_weights, fuse_mul_post, configs, autotune,
           x_name="X", x_layout=None) -> None:
    """x_layout: where X is none of forward's, but has a row for each of the total_rows."""
    _check_counts_and_flags(topk, permute_x=permute_x, permute_y=permute_y, fuse_mul_post=fuse_mul_post)
    checks.check_tensor(x_name, X, 2, x_layout or ("[tokens, K]" if permute_x else "[total_rows, K]"))
    checks.check_tensor("W", W, 3, "[E, N, K]")
    validate(X, W, m_sizes, None, None, None, None, "dynamic", rows_dtypes=(torch.int32, torch.int64),
             rows_name="m_sizes", a_name=x_name, w_name="W")
    total_rows = X.shape[0] * topk if permute_x and x_layout is None else X.shape[0]
    _check_permutations(gather_indices, permute_x, permute_y, total_rows)
    if fuse_mul_post:
        _check_topk_weights(topk_weights, permute_y, total_rows)
    _check_configs(configs, autotune)
    checks.check_same_device(**{x_name: X}, gather_indices=gather_indices, topk_weights=topk_weights if fuse_mul_post else None)


def _check_topk_weights(topk_weights, permute_y, total_rows) -> None:
    if not permute_y:
        raise ValueError("fuse_mul_post needs permute_y=True: topk_weights are in token order")
    if not isinstance(topk_weights, torch.Tensor):
        raise TypeError(f"topk_weights must be a torch.Tensor for fuse_mul_post, got {type(topk_weights).__name__}")
    checks.check_dtype("topk_weights", topk_weights.dtype)
    if topk_weights.numel() != total_rows:
        raise ValueError(f"topk_weights must have one entry for each of the {total_rows} rows, got "
                         f"{list(topk_weights.shape)}")
