"""The type of the experts' rows between the second GEMM and their sum: what it is by default, and that it is what is asked for."""
from __future__ import annotations

import pytest
import torch

from moe_xe import Fusions, LoraAdapter, fused_moe, fused_moe_workspace_bytes, lora_moe
from moe_xe.nn import Experts
from moe_xe.ops.gemm.grouped_gemm import grouped_gemm
from moe_xe.ops.routing.token_sort import combine, sort_tokens

from .case import HIDDEN, INTERMEDIATE, TOKENS, assert_right, check, make, make_shared, moved, reference, run
from .test_fused_moe_training import gradients

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BF16_BLOCK = dict(dtype=BF16, bias=(BF16, F32))


def rows_summed(block: dict, device, y_dtype: torch.dtype) -> torch.Tensor:
    """A gated silu block with one op after the other; the rows have this type."""
    x, w13, w2, weights, ids, b13, b2 = (moved(block[name], device) for name in (
        "hidden_states", "w13", "w2", "topk_weights", "topk_ids", "b13", "b2"))
    rows = sort_tokens(ids, w13.shape[0], topk_weights=weights)
    z = grouped_gemm(x, w13, rows.tokens_per_expert, bias=b13, gather_indices=rows.row_pairs, gather_divisor=ids.shape[1], out_dtype=F32)
    gate, up = z.chunk(2, -1)
    h = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    y = grouped_gemm(h, w2, rows.tokens_per_expert, bias=b2, scatter_indices=rows.row_pairs, row_scales=rows.row_scales, out_dtype=y_dtype)
    return combine(y, ids, w13.shape[0], out_dtype=x.dtype)


@pytest.mark.few(2)
@pytest.mark.parametrize("y_dtype", [None, BF16, F32])
def test_rows_have_the_type_that_is_asked_for(y_dtype, device):
    """An activation may be rounded otherwise by torch: a few elements differ. With the other type two of three would."""
    block = make(200, y_dtype=y_dtype, **BF16_BLOCK)
    out = check(block, device)
    same, other = ((out == rows_summed(block, device, dtype)).float().mean() for dtype in (
        (F32, BF16) if y_dtype is F32 else (BF16, F32)))
    assert same > 0.9 > other + 0.1


def test_of_float16_it_is_float32_by_default(device):
    block = make(dtype=F16, weight_layout="ekn")
    default, wide, own = (run(block | dict(y_dtype=y_dtype), device) for y_dtype in (None, F32, F16))
    assert torch.equal(default, wide) and not torch.equal(default, own)
    assert_right(own, reference(**block))


def test_a_float16_row_may_overflow_where_its_sum_does_not(device):
    """By default it is float32 and does not: experts 0 and 1 have opposite weights, of rows near 1e5."""
    block = make(dtype=F16, top_k=3, weight_layout="ekn")
    block["w13"][1], block["w2"][1] = block["w13"][0], -block["w2"][0]
    block["topk_ids"] = torch.tensor([0, 1, 2], dtype=torch.int32).expand(TOKENS, 3).contiguous()
    block["topk_weights"] = torch.tensor([2e6, 2e6, 1.0]).expand(TOKENS, 3).contiguous()
    out = run(block, device)
    assert out.isfinite().all() and not run(block | dict(y_dtype=F16), device).isfinite().all()
    rest = dict(block, topk_weights=torch.tensor([0.0, 0.0, 1.0]).expand(TOKENS, 3).contiguous())
    assert_right(out, reference(**rest))


@pytest.mark.parametrize("fusions", [Fusions(), pytest.param(Fusions(scatter=False), marks=pytest.mark.full)], ids=["fused", "no scatter"])
@pytest.mark.parametrize("shared", [pytest.param(0, marks=pytest.mark.full), pytest.param(INTERMEDIATE, marks=pytest.mark.full), INTERMEDIATE + 4])
def test_shared_experts_have_rows_of_it_too(shared, fusions, device):
    block = make(**BF16_BLOCK)
    if shared:
        block["shared"] = make_shared(shared, dtype=BF16)
    results = [check(block | dict(y_dtype=y_dtype), device, fusions=fusions) if fusions.scatter else
               run(block | dict(y_dtype=y_dtype), device, fusions) for y_dtype in (BF16, F32)]
    assert not torch.equal(*results)
    for result in results:
        assert_right(result, reference(**block))


def test_one_expert_a_token_has_no_rows(device):
    block = make(top_k=1, **BF16_BLOCK)
    assert torch.equal(run(block | dict(y_dtype=F32), device), run(block, device))


def test_workspace_is_as_large_as_the_rows_need(device):
    block, sizes = make(300, **BF16_BLOCK), {}
    for y_dtype in (BF16, F32):
        sizes[y_dtype] = fused_moe_workspace_bytes(300, 3, HIDDEN, INTERMEDIATE, 6, y_dtype=y_dtype)
        workspace = torch.full((sizes[y_dtype],), 0xFF, dtype=torch.uint8, device=device)
        check(block | dict(y_dtype=y_dtype), device, workspace=workspace)
        with pytest.raises(ValueError, match="workspace must have at least"):
            run(block | dict(y_dtype=y_dtype), device, workspace=workspace[1:])
    assert sizes[F32] - sizes[BF16] > 900 * HIDDEN and fused_moe_workspace_bytes(300, 3, HIDDEN, INTERMEDIATE, 6) == sizes[BF16]


@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep z"])
def test_training_has_it_and_gradients_do_not_depend_on_it(recompute, device):
    block = make(**BF16_BLOCK)
    grad_out = torch.randn(TOKENS, HIDDEN).to(BF16)
    (rounded, first), (wide, second) = (gradients(block | dict(y_dtype=y_dtype), device, grad_out, recompute=recompute) for y_dtype in (None, F32))
    assert not torch.equal(rounded, wide)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    if recompute:       # the same launches as in inference
        assert torch.equal(rounded, run(block, device)) and torch.equal(wide, run(block | dict(y_dtype=F32), device))


def test_experts_and_adapters_pass_it_on(device):
    experts = Experts(4, HIDDEN, INTERMEDIATE, y_dtype=F32, dtype=BF16, device=device)
    x, weights = torch.randn(TOKENS, HIDDEN).to(device, BF16), torch.rand(TOKENS, 3).to(device)
    ids = torch.randint(4, (TOKENS, 3), dtype=torch.int32).to(device)
    arguments = x, experts.gate_up_proj, experts.down_proj, weights, ids
    with torch.no_grad():
        wide = fused_moe(*arguments, y_dtype=F32)
        assert torch.equal(experts(x, weights, ids), wide) and not torch.equal(fused_moe(*arguments), wide)
        adapted = {name: moved(value, device) for name, value in make(**BF16_BLOCK).items()}
        adapted["lora2"] = LoraAdapter(torch.randn(6, 5, INTERMEDIATE).to(device, BF16), torch.randn(6, HIDDEN, 5).to(device, BF16), 0.0)
        assert not torch.equal(lora_moe(**adapted), lora_moe(**adapted, y_dtype=F32))


@pytest.mark.parametrize("dtype, y_dtype", [(BF16, F16), (F32, BF16), (F16, torch.float64), (BF16, "float32"), (BF16, torch.int8)])
def test_another_type_is_refused(dtype, y_dtype):
    message = f"y_dtype must be torch.float32 or hidden_states' {dtype}, got {y_dtype}"
    with pytest.raises(TypeError, match=message):
        run(make(dtype=dtype, y_dtype=y_dtype), "cpu")
    with pytest.raises(TypeError, match=message):
        fused_moe_workspace_bytes(1, 2, 8, 8, 4, dtype=dtype, y_dtype=y_dtype)
