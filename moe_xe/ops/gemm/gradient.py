"""The gradients of grouped products: more of them on the same queue, with gathers and scatters turned round. As these have gradients
in turn, so has every derivative."""
from __future__ import annotations

import torch

from ...plan.choice.choice import Choice
from ..signature import SavedArguments
from .grouped_gemm import INPUTS, dispatch, validate
from .grouped_outer import OuterCall, outer_product, source_rows, weights_gradient, with_zero_row

__all__: list[str] = []


def _setup_context(ctx, inputs, output):
    _, ctx.rows_format, ctx.schedule, choice, _ = inputs[len(INPUTS):]
    ctx.choice = Choice.parse(choice)
    ctx.inputs = SavedArguments(ctx, inputs[:len(INPUTS)])


def _backward(ctx, grad):
    inputs = INPUTS.unflatten(ctx.inputs.of(ctx))
    a, w, rows, bias, gather_indices, scatter_indices, row_scales = (getattr(inputs, name) for name in (
        "a", "w", "rows", "bias", "gather_indices", "scatter_indices", "row_scales"))
    needs_a, needs_w, needs_bias, needs_scales = (ctx.needs_input_grad[place] for place in _PLACES)
    grad, divisor = grad.contiguous(), inputs.gather_divisor
    if scatter_indices is not None:
        grad = with_zero_row(grad)
    rounded = grad.to(a.dtype)
    grad_a = grad_w = grad_bias = grad_scales = None
    if needs_a:
        dtype = a.dtype if gather_indices is None else torch.float32
        of_rows = _product(ctx, rounded, w.transpose(1, 2), rows, "dX", dtype, gather_indices=scatter_indices, row_scales=row_scales)
        grad_a = of_rows if gather_indices is None else _summed(of_rows, gather_indices, divisor, a)
    if needs_w:
        choice = ctx.choice.part("dW")
        if row_scales is None:
            grad_w = weights_gradient(w, rounded, a, rows, scatter_indices, gather_indices, divisor, ctx.rows_format, choice)
        else:
            of_rows = a if gather_indices is None else a[source_rows(gather_indices, divisor, len(a))]
            scaled = (of_rows * row_scales[:, None]).to(a.dtype)
            grad_w = weights_gradient(w, rounded, scaled, rows, scatter_indices, None, 1, ctx.rows_format, choice)
    if needs_bias:
        num_rows = len(a if gather_indices is None else gather_indices)
        factors = torch.ones(num_rows, 1, dtype=torch.float32, device=a.device) if row_scales is None else row_scales[:, None]
        sums = outer_product(OuterCall(factors, grad.float(), rows, None, scatter_indices, 1, ctx.rows_format), torch.float32)
        grad_bias = sums[:, 0].to(bias.dtype)
    if needs_scales:
        unscaled = _product(ctx, a, w, rows, "forward", torch.float32, bias=bias, gather_indices=gather_indices, gather_divisor=divisor)
        of_rows = grad if scatter_indices is None else grad[source_rows(scatter_indices, 1, len(grad))]
        used = _used_rows(rows, ctx.rows_format, len(unscaled))
        grad_scales = torch.where(used, (of_rows * unscaled).sum(-1), 0.0)     # beyond, grad may be anything
    result = [None] * len(ctx.needs_input_grad)
    for place, found in zip(_PLACES, (grad_a, grad_w, grad_bias, grad_scales)):
        result[place] = found
    return tuple(result)


def _used_rows(rows: torch.Tensor, rows_format: str, num_rows: int) -> torch.Tensor:
    """Which of the sorted rows are an expert's."""
    if rows_format == "batched":
        places = torch.arange(num_rows // max(len(rows), 1), dtype=torch.int32, device=rows.device)
        return (places < rows[:, None]).flatten()
    places = torch.arange(num_rows, dtype=torch.int32, device=rows.device)
    return places < (rows.sum() if rows_format == "counts" else rows[-1:].sum())


_PLACES = tuple(map(INPUTS.names.index, ("a", "w", "bias", "row_scales")))


def _product(ctx, a: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, part: str, dtype: torch.dtype, *, bias=None,
             gather_indices=None, gather_divisor: int = 1, row_scales=None) -> torch.Tensor:
    """A new grouped GEMM of sorted rows, checked as a user's; rows beyond the counts are zero."""
    call = validate(a, w, rows, bias, gather_indices, dtype, None, ctx.schedule, rows_dtypes=(rows.dtype,), rows_format=ctx.rows_format,
                    gather_divisor=gather_divisor, row_scales=row_scales, choice=ctx.choice.part(part))
    return dispatch(call, dtype, None, zeros=True)


def _summed(of_rows: torch.Tensor, indices: torch.Tensor, divisor: int, operand: torch.Tensor) -> torch.Tensor:
    """The operand's gradient from that of its gathered rows, of which several may be one: summed in float32."""
    sums = torch.zeros(operand.shape, dtype=torch.float32, device=operand.device)
    return sums.index_add(0, source_rows(indices, divisor, len(operand)), of_rows).to(operand.dtype)


torch.library.register_autograd("moe_xe::grouped_gemm", _backward, setup_context=_setup_context)


def _outer_context(ctx, inputs, output):
    left, right, rows, indices_left, indices_right, ctx.gather_divisor, ctx.rows_format, choice, _ = inputs
    ctx.choice, ctx.schedule = Choice(None, Choice.parse(choice).autotune), "dynamic"     # a config is of the outer product
    ctx.save_for_backward(left, right, rows, indices_left, indices_right)


def _outer_backward(ctx, grad):
    """d[e] = left_e^T @ right_e: each row's gradient is the other one's row times grad[e] or its transposed."""
    left, right, rows, indices_left, indices_right = ctx.saved_tensors
    grad = grad.to(left.dtype).contiguous()
    grads = [None, None]
    for place, (own, own_indices, other, other_indices, w) in enumerate((
            (left, indices_left, right, indices_right, grad), (right, indices_right, left, indices_left, grad.transpose(1, 2)))):
        if ctx.needs_input_grad[place]:
            dtype = own.dtype if own_indices is None else torch.float32
            of_rows = _product(ctx, other, w, rows, "forward", dtype, gather_indices=other_indices, gather_divisor=ctx.gather_divisor)
            grads[place] = of_rows if own_indices is None else _summed(of_rows, own_indices, ctx.gather_divisor, own)
    return *grads, *[None] * 7


torch.library.register_autograd("moe_xe::grouped_outer", _outer_backward, setup_context=_outer_context)
