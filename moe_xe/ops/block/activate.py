"""The activation between the two GEMMs as a launch of its own, and its gradients: for training, which keeps z."""
from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from ...device import facts_of
from ...jit import compile_kernel
from ...jit.activate_source import activate_source
from ...plan.block.activate import MAX_ROWS, ActivateProblem, activate_groups, lane_columns
from ...plan.problem import MAX_COLUMNS, Activation, ActivationKind
from .. import checks
from ..checks import DTYPES, row_stride
from ..launch import pointer_of, target_of
from ..library import define
from ..plain import takes_plain_tensors
from ..submission import Submission

__all__ = ["ActivationGradients", "activate", "activate_backward", "launch_activate"]


class ActivationGradients(NamedTuple):
    """None for what was not wanted. Unused rows of dz and hs hold anything, those of dscale are zero.

    dz: [rows, 2I or I], ``row_scales * g * d act(z)``, columns as z's. hs: [rows, I], ``row_scales * act(z)``.
    dscale: float32 [rows], ``sum over columns of g * act(z)``, in an order that never changes.
    """
    dz: torch.Tensor | None
    hs: torch.Tensor | None
    dscale: torch.Tensor | None


@takes_plain_tensors
def activate(z: torch.Tensor, activation: Activation, *, row_pairs: torch.Tensor | None = None,
             out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """``act(z)`` of each row, computed in float32.

    z: [rows, 2I] for a gated activation (gates then up values, or interleaved), else [rows, I]; bfloat16, float16 or
      float32, rows contiguous.
    row_pairs: [rows] int32; rows where it is negative are not used: neither read nor written.
    out_dtype: bfloat16, float16 or float32; z's dtype by default.

    Returns [rows, I]. Differentiable in z, once. Raises TypeError or ValueError naming the argument.
    """
    _check(z, activation, out_dtype, row_pairs=row_pairs)
    return torch.ops.moe_xe.activate(z, row_pairs, *_flat(activation), out_dtype or z.dtype)


@takes_plain_tensors
def activate_backward(z: torch.Tensor, g: torch.Tensor, activation: Activation, *,
                      row_scales: torch.Tensor | None = None, row_pairs: torch.Tensor | None = None,
                      want: Collection[str] = ActivationGradients._fields,
                      out_dtype: torch.dtype | None = None) -> ActivationGradients:
    """Gradients of ``row_scales * (act(z) @ w)``, given ``g = gradient @ w^T``, in one pass over z and g.

    z, activation, row_pairs: as for `activate`. Beyond a limit the gradient is zero, at it it passes.
    g: [rows, I] bfloat16, float16 or float32, not yet multiplied with row_scales.
    row_scales: [rows] float32, 1 by default.
    want: which of "dz", "hs" and "dscale" are computed.
    out_dtype: dz's and hs' dtype, bfloat16, float16 or float32; z's by default.

    Raises TypeError or ValueError naming the argument.
    """
    _check(z, activation, out_dtype, g=g, row_scales=row_scales, row_pairs=row_pairs)
    fields = ActivationGradients._fields
    if isinstance(want, str) or not want or not set(want) <= set(fields):
        raise ValueError(f"want must be some of {fields}, got {want!r}")
    wanted = [name in want for name in fields]
    results = iter(torch.ops.moe_xe.activate_backward(z, g, row_scales, row_pairs, *_flat(activation), out_dtype or z.dtype,
                                                      wanted))
    return ActivationGradients(*(next(results) if is_wanted else None for is_wanted in wanted))


def launch_activate(submission: Submission, z: torch.Tensor, activation: Activation, *, g: torch.Tensor | None = None,
                    row_scales: torch.Tensor | None = None, row_pairs: torch.Tensor | None = None,
                    dz: torch.Tensor | None = None, hs: torch.Tensor | None = None,
                    dscale: torch.Tensor | None = None) -> None:
    """Submits the kernel that fills dz, hs and dscale, those that are given.

    Shapes as in `ActivationGradients`; each matrix has contiguous rows and a dtype of its own. dz may be z, and hs may be
    g: the same memory, strides and dtype. Without row_scales, hs is act(z). The arguments are checked ones; ValueError
    where g is missing, which dz and dscale need.
    """
    if g is None and (dz is not None or dscale is not None):
        raise ValueError("g must be given for dz and dscale, got None")
    if z.shape[0] == 0 or (dz is None and hs is None and dscale is None):
        return
    matrices = {name: tensor for name, tensor in (("z", z), ("g", g), ("dz", dz), ("hs", hs)) if tensor is not None}
    checks.check_addresses(**matrices, row_scales=row_scales, row_pairs=row_pairs, dscale=dscale)
    places = {name: (tensor.data_ptr(), row_stride(name, tensor)) for name, tensor in matrices.items()}
    dtypes = {name: DTYPES[tensor.dtype] for name, tensor in matrices.items()}
    size = z.shape[1] // 2 if activation.gated else z.shape[1]
    target = target_of(facts_of(submission.queue))
    problem = ActivateProblem(
        size, activation, **dtypes, dscale=dscale is not None, has_row_scales=row_scales is not None,
        has_row_pairs=row_pairs is not None,
        columns=1 if target.is_cpu else lane_columns(size, [(*places[name], dtypes[name]) for name in matrices]))
    groups, group_size = activate_groups(problem, z.shape[0], target.is_cpu, target.cores)
    absent = (None, 0)
    kernel = compile_kernel(submission.queue, activate_source(problem, target.isa))
    submission.launch(kernel, groups, group_size, (
        *places["z"], *places.get("g", absent), pointer_of(row_scales), pointer_of(row_pairs), *places.get("dz", absent),
        *places.get("hs", absent), pointer_of(dscale), z.shape[0]))


def _check(z, activation, out_dtype, *, g=None, row_scales=None, row_pairs=None) -> None:
    if not isinstance(activation, Activation):
        raise TypeError(f"activation must be a moe_xe.plan.problem.Activation, got {type(activation).__name__}")
    checks.check_float32("activation.alpha", activation.alpha)
    if activation.limit is not None:
        checks.check_float32("activation.limit", activation.limit, positive=True)
    checks.check_tensor("z", z, 2, "[rows, 2I]" if activation.gated else "[rows, I]")
    checks.check_dtype("z", z.dtype)
    rows, columns = z.shape
    size = columns // 2 if activation.gated else columns
    if not checks.holds(columns > 0) or (activation.gated and not checks.holds(columns % 2 == 0)):
        wanted = "pairs of columns, as the activation is gated" if activation.gated else "columns"
        raise ValueError(f"z must have {wanted}, got {checks.shape_of(z)}")
    if not checks.holds(rows <= MAX_ROWS) or not checks.holds(columns <= MAX_COLUMNS):
        raise ValueError(f"z must have at most {MAX_ROWS} rows and {MAX_COLUMNS} columns, got {checks.shape_of(z)}")
    row_stride("z", z)
    if g is not None:
        checks.check_tensor("g", g, 2, "[rows, I]")
        checks.check_dtype("g", g.dtype)
        if not checks.has_shape(g, (rows, size)):
            raise ValueError(f"g must be [rows, I] = {[rows, size]}, got {checks.shape_of(g)}")
        row_stride("g", g)
    if row_scales is not None:
        checks.check_indices("row_scales", row_scales, rows, "rows", (torch.float32,))
    if row_pairs is not None:
        checks.check_indices("row_pairs", row_pairs, rows, "rows", (torch.int32,))
    checks.check_same_device(z=z, g=g, row_scales=row_scales, row_pairs=row_pairs)
    if out_dtype is not None:
        checks.check_dtype("out_dtype", out_dtype)


def _flat(activation: Activation) -> tuple:
    """An Activation as the ops' arguments."""
    return activation.kind.value, activation.gated, activation.interleaved, activation.alpha, activation.limit


def _activation(kind: str, *rest) -> Activation:
    return Activation(ActivationKind(kind), *rest)


def _hs_shape(z: torch.Tensor, gated: bool) -> tuple[int, int]:
    return z.shape[0], z.shape[1] // 2 if gated else z.shape[1]


_ACTIVATION = "str kind, bool gated, bool interleaved, float alpha, float? limit"


def _activate(submission, z, row_pairs, kind, gated, interleaved, alpha, limit, out_dtype):
    h = submission.result(*_hs_shape(z, gated), dtype=out_dtype)
    launch_activate(submission, z, _activation(kind, gated, interleaved, alpha, limit), row_pairs=row_pairs, hs=h)
    return h


def _activate_backward(submission, z, g, row_scales, row_pairs, kind, gated, interleaved, alpha, limit, out_dtype, wanted):
    """The wanted ones of dz, hs and dscale, in this order."""
    results = {name: submission.result(*shape, dtype=dtype) for name, shape, dtype in _gradients(z, gated, out_dtype, wanted)}
    launch_activate(submission, z, _activation(kind, gated, interleaved, alpha, limit), g=g, row_scales=row_scales,
                    row_pairs=row_pairs, **results)
    return list(results.values())


def _fake(z, row_pairs, kind, gated, interleaved, alpha, limit, out_dtype):
    return z.new_empty(_hs_shape(z, gated), dtype=out_dtype)


def _fake_backward(z, g, row_scales, row_pairs, kind, gated, interleaved, alpha, limit, out_dtype, wanted):
    return [z.new_empty(shape, dtype=dtype) for _, shape, dtype in _gradients(z, gated, out_dtype, wanted)]


def _gradients(z: torch.Tensor, gated: bool, dtype: torch.dtype, wanted: list[bool]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of those that are wanted."""
    kinds = ("dz", tuple(z.shape), dtype), ("hs", _hs_shape(z, gated), dtype), ("dscale", tuple(z.shape[:1]), torch.float32)
    return [kind for kind, is_wanted in zip(kinds, wanted) if is_wanted]


define("activate", f"(Tensor z, Tensor? row_pairs, {_ACTIVATION}, ScalarType out_dtype) -> Tensor", _activate, fake=_fake)
define("activate_backward", f"(Tensor z, Tensor g, Tensor? row_scales, Tensor? row_pairs, {_ACTIVATION}, ScalarType out_dtype, "
                            "bool[3] wanted) -> Tensor[]", _activate_backward, fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    z, row_pairs, *ctx.activation, _ = inputs
    ctx.save_for_backward(z, row_pairs)


def _backward(ctx, grad):
    """Rows that are not used have no gradient, which the kernel leaves as it finds it."""
    z, row_pairs = ctx.saved_tensors
    dz, = torch.ops.moe_xe.activate_backward(z, grad.contiguous(), None, row_pairs, *ctx.activation, z.dtype, [True, False, False])
    if row_pairs is not None:
        dz = torch.where(row_pairs[:, None] < 0, 0, dz)
    return dz, *(None,) * 7


def _no_second_derivative(ctx, *_):
    raise RuntimeError("moe_xe: activate has no second derivatives")


torch.library.register_autograd("moe_xe::activate", _backward, setup_context=_setup_context)
torch.library.register_autograd("moe_xe::activate_backward", _no_second_derivative)
