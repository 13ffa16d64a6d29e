import inspect

import pytest
import torch
import torch.nn.functional as F

import moe_xe
from moe_xe.bench.numerics import agrees, reference_grouped_gemm
from tests.integrations.quantised_weights import small_weight
from tests.quantized.reference import dense

if not hasattr(F, "scaled_grouped_mm"):
    pytest.skip("torch has it since 2.10", allow_module_level=True)
Recipe, SwizzleType = F.ScalingType, F.SwizzleType
COUNTS, N, K = [3, 0, 11], 150, 140
E8M0, F32 = torch.float8_e8m0fnu, torch.float32
# format, group, dtype of scales, recipes, and scale_b of the weight's scales [E, N / gn, K / gk]
RECIPES = {
    "TensorWise": ("fp8_e4m3", (N, K), F32, Recipe.TensorWise, lambda scales: scales.flatten()),
    "RowWise": ("fp8_e5m2", (1, K), F32, Recipe.RowWise, lambda scales: scales[..., 0].contiguous()),
    "BlockWise128x128": ("fp8_e4m3", (128, 128), F32, Recipe.BlockWise128x128, lambda scales: scales.mT),
    "BlockWise1x32": ("fp8_e4m3", (1, 32), E8M0, [Recipe.BlockWise1x32], lambda scales: [scales.mT]),
    "mxfp4": ("mxfp4", None, E8M0, Recipe.BlockWise1x32, lambda scales: scales.mT),
}


def make(recipe="RowWise", device="cpu"):
    format, group, dtype, recipes, scale_of = RECIPES[recipe]
    weight = small_weight(format, N, K, group, dtype)
    codes = weight.codes.view(torch.float4_e2m1fn_x2) if format == "mxfp4" else weight.codes
    scale = scale_of(weight.scales)
    scale = [part.to(device) for part in scale] if isinstance(scale, list) else scale.to(device)
    offs = torch.tensor(COUNTS).cumsum(0, dtype=torch.int32).to(device)
    return dict(mat_b=codes.to(device).mT, scale_b=scale, scale_recipe_b=recipes, offs=offs), torch.from_numpy(dense(weight))


PLAIN = dict(scale_a=None, scale_recipe_a=None)


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_weights(recipe, device):
    arguments, w = make(recipe, device)
    a, bias = torch.randn(sum(COUNTS), K, device=device, dtype=torch.bfloat16), torch.randn(len(COUNTS), N, device=device)
    out = moe_xe.scaled_grouped_mm(a, bias=bias, **PLAIN, **arguments)
    assert out.dtype == torch.bfloat16 and agrees(out.cpu(), reference_grouped_gemm(a.cpu(), w, COUNTS, bias.cpu()), K)


@pytest.mark.parametrize("recipe", [Recipe.RowWise, Recipe.TensorWise])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rows_of_fp8(dtype, recipe, device):
    arguments, w = make(device=device)
    a = torch.randn(sum(COUNTS), K, device=device).to(dtype)
    scale = torch.rand(sum(COUNTS) if recipe is Recipe.RowWise else 1, device=device) + 0.1
    out = moe_xe.scaled_grouped_mm(a, scale_a=scale, scale_recipe_a=recipe, output_dtype=torch.float32, **arguments)
    assert agrees(out.cpu(), reference_grouped_gemm(a.cpu().bfloat16(), w, COUNTS) * scale.cpu().double()[:, None], 2 * K)     # w is rounded, too


def test_gradient_of_rows(device):
    arguments, w = make("BlockWise128x128", device)
    a, grad = torch.randn(sum(COUNTS), K, device=device, requires_grad=True), torch.randn(sum(COUNTS), N, device=device)
    out = moe_xe.scaled_grouped_mm(a, output_dtype=torch.float32, **PLAIN, **arguments)
    assert agrees(out.detach().cpu(), reference_grouped_gemm(a.detach().cpu(), w, COUNTS), K)
    out.backward(grad)
    assert agrees(a.grad.cpu(), reference_grouped_gemm(grad.cpu(), w.mT, COUNTS), N)


def test_nvfp4():
    weight = small_weight("nvfp4", N, 144, None, torch.float8_e4m3fn)
    scales, factors = torch.ones(3, N, 9).to(torch.float8_e4m3fn), torch.tensor([0.3, 0.02, 7.0])
    a = torch.randn(sum(COUNTS), 144)
    out = moe_xe.scaled_grouped_mm(a, weight.codes.view(torch.float4_e2m1fn_x2).mT, None, None, [scales.mT, factors],
                                   [Recipe.BlockWise1x16, Recipe.TensorWise], offs=torch.tensor([3, 3, 14], dtype=torch.int32),
                                   output_dtype=torch.float32)
    w = torch.from_numpy(dense(moe_xe.QuantizedWeight(weight.codes, scales, format="nvfp4"))) * factors.double()[:, None, None]
    assert agrees(out, reference_grouped_gemm(a, w, COUNTS), 144)


def test_arguments_are_torchs():
    torchs, ours = (list(inspect.signature(f).parameters.values()) for f in (F.scaled_grouped_mm, moe_xe.scaled_grouped_mm))
    assert [(p.name, p.default) for p in ours[:len(torchs)]] == [(p.name, p.default) for p in torchs]


ARGUMENTS = dict(mat_a=torch.randn(14, K)) | PLAIN | make()[0]
CODES = dict(mat_a=torch.randn(14, K).to(torch.float8_e4m3fn), scale_a=torch.ones(14), scale_recipe_a=Recipe.RowWise)
BAD = [
    (dict(mat_a=torch.randn(3, 14, K)), "mat_a must have 2 dimensions"),
    (dict(mat_b=torch.zeros(K, N)), "mat_b must have 3 dimensions"),
    (dict(offs=None), "offs must be given for a 2D x 3D product, got None"),
    (dict(swizzle_b=SwizzleType.SWIZZLE_32_4_4), "swizzle_b must be None or NO_SWIZZLE, got .'SWIZZLE_32_4_4'."),
    (dict(contraction_dim=[1, 1]), r"contraction_dim must be empty, got \[1, 1\]"),
    (dict(scale_a=torch.ones(14)), "scale_a must be None for a mat_a that is torch.float32"),
    (dict(scale_recipe_a=Recipe.RowWise), "scale_recipe_a must be None for a mat_a that is torch.float32"),
    (CODES | dict(scale_recipe_a=Recipe.BlockWise1x128), "scale_recipe_a must be RowWise or TensorWise, .*BlockWise1x128"),
    (CODES | dict(scale_a=torch.ones(13)), r"scale_a must be float32 of 14 elements for RowWise, got float32\[13\]"),
    (CODES | dict(bias=torch.ones(3, N)), r"bias must be None with scale_a, got float32\[3, 150\]"),
    (dict(scale_b=None), r"scale_b must be a torch.Tensor for each of scale_recipe_b, got \[\]"),
    (dict(scale_b=torch.ones(3, 4)), r"mat_b, scale_b: scale must be .* divides N = 150, got float32\[3, 4\]"),
    (dict(scale_recipe_b=Recipe.BlockWise1x16), "scale_recipe_b must be one that mat_b's dtype torch.float8_e5m2 can have, .*BlockWise1x16"),
    (dict(mat_b=torch.zeros(3, K, N)), "scale_recipe_b must be one that mat_b's dtype torch.float32 can have"),
    (dict(mat_a=torch.randn(14, K + 1)), "mat_a and mat_b must agree in K"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=range(len(BAD)))
def test_bad_input(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        moe_xe.scaled_grouped_mm(**ARGUMENTS | changes)
