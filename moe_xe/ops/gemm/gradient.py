"""The gradients of `grouped_gemm`: two more grouped GEMMs on the same queue, with its gathers and scatters turned round."""
from __future__ import annotations

import torch

from ...plan.choice.choice import Choice
from . import grouped_gemm as _grouped_gemm    # which defines the op
from .grouped_outer import weights_gradient

__all__: list[str] = []


def _setup_context(ctx, inputs, output):
    a, w, rows, bias, gather_indices, scatter_indices, row_scales, ctx.gather_divisor, _, ctx.rows_format, ctx.schedule, choice = inputs
    ctx.choice = Choice.parse(choice)
    ctx.save_for_backward(a, w, rows, bias, gather_indices, scatter_indices, row_scales)


def _backward(ctx, grad):
    a, w, rows, bias, gather_indices, scatter_indices, row_scales = ctx.saved_tensors
    needs_a, needs_w, needs_bias, needs_scales = (ctx.needs_input_grad[place] for place in (0, 1, 3, 6))
    ops, grad, divisor = torch.ops.moe_xe, grad.contiguous(), ctx.gather_divisor
    rounded = grad.to(a.dtype)
    grad_a = grad_w = grad_bias = grad_scales = None
    if needs_a:
        grad_a = _input_gradient(ctx, rounded, a, w, rows, gather_indices, scatter_indices, row_scales)
    if needs_w:
        if row_scales is None:
            grad_w = weights_gradient(w, rounded, a, rows, scatter_indices, gather_indices, divisor, ctx.rows_format,
                                      ctx.choice.part("dW"))
        else:
            of_rows = a if gather_indices is None else a[gather_indices.long() // divisor]
            scaled = (of_rows * row_scales[:, None]).to(a.dtype)
            grad_w = weights_gradient(w, rounded, scaled, rows, scatter_indices, None, 1, ctx.rows_format, ctx.choice.part("dW"))
    if needs_bias:
        factors = torch.ones(len(grad), 1, device=grad.device) if row_scales is None else row_scales[:, None]
        sums = ops.grouped_outer(factors, grad.float(), rows, None, scatter_indices, 1, ctx.rows_format, "", torch.float32)
        grad_bias = sums[:, 0].to(bias.dtype)
    if needs_scales:
        unscaled = torch.zeros(len(grad), w.shape[1], dtype=torch.float32, device=grad.device)
        ops.grouped_gemm_out(a, w, rows, bias, gather_indices, None, None, divisor, unscaled, ctx.rows_format, ctx.schedule,
                             ctx.choice.part("forward").text)
        of_rows = grad if scatter_indices is None else grad[scatter_indices.long()]
        grad_scales = (of_rows * unscaled).sum(-1)
    return grad_a, grad_w, None, grad_bias, None, None, grad_scales, None, None, None, None, None


def _input_gradient(ctx, grad, a, w, rows, gather_indices, scatter_indices, row_scales) -> torch.Tensor:
    """Each row's gradient times its expert's weights; rows that were gathered more than once are summed in float32."""
    dtype = a.dtype if gather_indices is None else torch.float32
    of_rows = torch.zeros(len(grad), w.shape[2], dtype=dtype, device=grad.device)    # rows beyond the counts have none
    torch.ops.moe_xe.grouped_gemm_out(grad, w.transpose(1, 2), rows, None, scatter_indices, None, row_scales, 1, of_rows,
                                      ctx.rows_format, ctx.schedule, ctx.choice.part("dX").text)
    if gather_indices is None:
        return of_rows
    sums = torch.zeros(a.shape, dtype=torch.float32, device=a.device)
    return sums.index_add(0, gather_indices.long() // ctx.gather_divisor, of_rows).to(a.dtype)


torch.library.register_autograd("moe_xe::grouped_gemm", _backward, setup_context=_setup_context)


def _outer_context(ctx, inputs, output):
    left, right, rows, indices_left, indices_right, ctx.gather_divisor, ctx.rows_format, choice, _ = inputs
    ctx.autotune = Choice.parse(choice).autotune
    ctx.save_for_backward(left, right, rows, indices_left, indices_right)


def _outer_backward(ctx, grad):
    """d[e] = left_e^T @ right_e: each row's gradient is the other one's row times grad[e] or its transposed."""
    left, right, rows, indices_left, indices_right = ctx.saved_tensors
    grad = grad.to(left.dtype).contiguous()
    grads = [None, None]
    for place, (own, own_indices, other, other_indices, w) in enumerate((
            (left, indices_left, right, indices_right, grad), (right, indices_right, left, indices_left, grad.transpose(1, 2)))):
        if not ctx.needs_input_grad[place]:
            continue
        total_rows = len(own if own_indices is None else own_indices)
        of_rows = torch.zeros(total_rows, own.shape[1], dtype=own.dtype if own_indices is None else torch.float32, device=own.device)
        torch.ops.moe_xe.grouped_gemm_out(other, w, rows, None, other_indices, None, None, ctx.gather_divisor, of_rows,
                                          ctx.rows_format, "dynamic", Choice(None, ctx.autotune).text)
        if own_indices is not None:
            sums = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
            of_rows = sums.index_add(0, own_indices.long() // ctx.gather_divisor, of_rows).to(own.dtype)
        grads[place] = of_rows
    return *grads, None, None, None, None, None, None, None


torch.library.register_autograd("moe_xe::grouped_outer", _outer_backward, setup_context=_outer_context)
