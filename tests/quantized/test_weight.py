import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import moe_xe
from moe_xe.plan.formats import FORMATS as SCHEMES
from moe_xe.plan.formats import Codes, Quantization, ScaleType
from moe_xe.quantized.checks import check_numbers

from .reference import FORMATS, dense, random_weight, raw

ALL = dict(zeros=True, global_scales=True)


@st.composite
def weights(draw):
    format = draw(st.sampled_from(sorted(FORMATS)))
    bits, own, code_dtypes, scale_dtypes, can_have_zeros = FORMATS[format]
    k = draw(st.integers(1, 40)) * (2 if bits == 4 else 1)
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 9)), k)
    group = own or (draw(st.integers(1, 12)), draw(st.integers(1, 90)))
    return random_weight(format, shape, group, draw(st.sampled_from(scale_dtypes)), can_have_zeros and draw(st.booleans()),
                         draw(st.booleans()), draw(st.sampled_from(code_dtypes)), draw(st.integers(0, 2**32)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))


def memory(weight: moe_xe.QuantizedWeight) -> list:
    tensors = (weight.codes, weight.scales, weight.zeros, weight.global_scales)
    return [None if tensor is None else (tensor.dtype, tensor.shape, raw(tensor.contiguous()).tobytes()) for tensor in tensors]


def test_formats_are_those_of_the_plan():
    assert set(FORMATS) == set(SCHEMES)


@settings(max_examples=150, deadline=None)
@given(weights())
def test_dequantize(weight):
    expected = torch.from_numpy(dense(weight))
    exact = weight.dequantize(torch.float64)
    assert exact.dtype == torch.float64 and exact.shape == weight.shape and same(exact, expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = weight.dequantize(dtype)
        assert numbers.dtype == dtype
        if weight.scales.dtype != torch.float32 and weight.global_scales is None:
            assert same(numbers, expected.to(dtype))
        elif dtype == torch.float32:
            inside = expected.abs() < 1e30      # so is what global scales multiply
            torch.testing.assert_close(numbers[inside], expected[inside].to(dtype), rtol=2**-22, atol=2**-148)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("format", ["mxfp4", "mxfp8", "fp8_e5m2"])
def test_powers_of_two_as_scales(format, dtype):
    one = {"mxfp4": 0x22, "mxfp8": 0x38, "fp8_e5m2": 0x3C}[format]
    width = 32 * FORMATS[format][0] // 8
    codes = torch.full((1, 1, 4 * width), one, dtype=torch.uint8)
    scales = torch.tensor([[[0, 1, 254, 255]]], dtype=torch.uint8).view(dtype)
    weight = moe_xe.QuantizedWeight(codes, scales, format=format, group=(1, 32))
    for computed in (torch.float32, torch.float64):
        assert weight.dequantize(computed)[0, 0, ::32].tolist()[:3] == [2.0**-127, 2.0**-126, 2.0**127]
        assert weight.dequantize(computed)[0, 0, 96:].isnan().all()


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "mxfp8"])
def test_codes_that_are_no_numbers(format):
    codes = torch.tensor([[[0x7F, 0xFF, 0x7C, 0xFC]]], dtype=torch.uint8)
    scales = torch.full((1, 1, 1), 127, dtype=torch.uint8)
    numbers = moe_xe.QuantizedWeight(codes, scales, format=format, group=(1, 32)).dequantize(torch.bfloat16)[0, 0].tolist()
    assert np.isnan(numbers[:2]).all() and numbers[2:] == ([math.inf, -math.inf] if format == "fp8_e5m2" else [384.0, -384.0])


def test_transposed():
    weight = random_weight("uint4", (3, 6, 10), (4, 4), **ALL)
    for turned in (weight.mT, weight.transpose(1, 2), weight.transpose(-1, 1)):
        assert turned.shape == (3, 10, 6) and turned.transposed and turned.codes is weight.codes
        assert same(turned.dequantize(), weight.dequantize().mT)
        assert turned.quantization == weight.quantization and turned.mT.shape == weight.shape == (3, 6, 10)
    assert moe_xe.QuantizedWeight(weight.codes, weight.scales, weight.zeros, None, "uint4", (4, 4), True).shape == (3, 10, 6)
    for dims in ((0, 1), (1, 1), (2, 0)):
        with pytest.raises(ValueError, match="dim0 and dim1 must be the last two"):
            weight.transpose(*dims)


@pytest.mark.parametrize("experts", [slice(1, 3), slice(None, 2), slice(-1, None, 1), slice(2, 2), slice(None)])
def test_slices_of_experts(experts):
    weight = random_weight("int4", (4, 5, 18), (2, 8), **ALL).mT
    part = weight[experts]
    assert same(part.dequantize(), weight.dequantize()[experts]) and part.num_experts == len(range(4)[experts])
    assert part.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()


def test_index_must_be_a_slice():
    weight = random_weight("int4", (4, 5, 18))
    with pytest.raises(TypeError, match="slice of experts, got int"):
        weight[1]
    with pytest.raises(TypeError, match="slice of experts, got int"):
        list(weight)
    with pytest.raises(ValueError, match="step 1, got 2"):
        weight[::2]


def test_what_it_says_of_itself():
    weight = random_weight("nvfp4", (3, 5, 38), global_scales=True)
    assert weight.num_experts == 3 and weight.device == torch.device("cpu")
    assert weight.nbytes == 3 * 5 * 19 + 3 * 5 * 3 + 3 * 4
    assert repr(weight.mT) == "QuantizedWeight(nvfp4 [3, 38, 5], scales float8_e4m3fn[3, 5, 3] of (1, 16), global_scales, transposed, cpu)"
    assert weight.quantization == Quantization(Codes.e2m1, ScaleType.e4m3, 1, 16, global_scales=True)
    assert random_weight("uint4", group=(3, 4)).quantization == Quantization(Codes.uint4, ScaleType.f32, 3, 4, zero=8.0)
    assert random_weight("int8", scale_dtype=torch.bfloat16, zeros=True).quantization == Quantization(
        Codes.int8, ScaleType.bf16, 1, 32, zeros=True)
    assert random_weight("fp8_e5m2", scale_dtype=torch.uint8).quantization.scales is ScaleType.e8m0
    assert weight in {weight} and weight != copy.copy(weight)       # by identity


def test_to_another_device():
    weight = random_weight("int8", **ALL).mT
    moved = weight.to("meta", non_blocking=True)
    assert moved.shape == weight.shape and {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert weight.to("cpu").codes is weight.codes


def test_prepacked_and_contiguous():
    weight = random_weight("int8", (4, 3, 5), (2, 2))
    assert weight.prepacked() is weight
    part = weight[1:]       # 15 bytes further
    assert part.codes.data_ptr() % 64 != 0
    packed = part.prepacked()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (packed.codes, packed.scales))
    assert memory(packed) == memory(part)
    spaced = moe_xe.QuantizedWeight(weight.codes[::2], weight.scales[:2], format="int8", group=(2, 2))
    for dense_one in (spaced.contiguous(), spaced.prepacked()):
        assert dense_one.codes.is_contiguous() and memory(dense_one) == memory(spaced)


@pytest.mark.parametrize("format, byte", [("fp8_e4m3", 0xFF), ("mxfp8", 0x7F), ("fp8_e5m2", 0x7C), ("fp8_e5m2", 0xFE)])
def test_who_knows_that_codes_are_finite(format, byte):
    made = moe_xe.QuantizedWeight.quantize(torch.randn(4, 3, 32), format, (1, 32))
    given = moe_xe.QuantizedWeight(made.codes, made.scales, format=format, group=(1, 32))
    assert made.finite and made.prepacked() is made and made[1:].mT.finite
    assert not given.finite and not given.quantization.finite and given.prepacked().finite
    assert made.cat([made, made]).finite and not made.cat([made, given]).finite
    given.codes.view(torch.uint8)[2, 1, 7] = byte
    assert not given.prepacked().finite and given[:2].prepacked().finite
    with pytest.raises(ValueError, match=rf"codes must be finite numbers, but codes\[2, 1, 7\] is {byte:#04x} in {format}"):
        check_numbers(given)
    int8 = moe_xe.QuantizedWeight.quantize(torch.randn(4, 3, 32), "int8", (1, 32))
    assert moe_xe.QuantizedWeight(int8.codes, int8.scales, format="int8", group=(1, 32)).finite


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float32"])
def test_dequantize_to_no_such_dtype(dtype):
    with pytest.raises(TypeError, match="dtype must be float32, float16, bfloat16 or float64, got"):
        random_weight("int4").dequantize(dtype)


def test_copies():
    weight = random_weight("uint4", **ALL).mT
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert memory(other) == memory(weight) and repr(other) == repr(weight)


def test_pytree():
    weight = random_weight("uint4", **ALL).mT
    leaves, tree = pytree.tree_flatten({"w": weight})
    assert [id(leaf) for leaf in leaves] == [id(weight.codes), id(weight.scales), id(weight.zeros), id(weight.global_scales)]
    again = pytree.tree_unflatten(leaves, tree)["w"]
    assert type(again) is moe_xe.QuantizedWeight and again.codes is weight.codes and repr(again) == repr(weight)
    assert pytree.tree_map(lambda tensor: tensor.dim(), weight).codes == 3
    assert pytree.keystr(pytree.tree_flatten_with_path(weight)[0][1][0]) == ".scales"


class Holder(torch.nn.Module):
    """A weight that is made of buffers at each call, and one that it has."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x, given):
        made = moe_xe.QuantizedWeight(self.codes, self.scales, self.zeros, None, self.weight.format, list(self.weight.group))
        return x @ made.mT.dequantize()[0] + self.weight.dequantize()[1, 0, 0] + given.shape[2], given.mT[1:], made


def test_compiles_in_one_graph():
    weight, given = random_weight("uint4", zeros=True), random_weight("fp8_e4m3")
    module, x = Holder(weight), torch.randn(3, 70)
    expected, (out, part, made) = module(x, given), torch.compile(module, fullgraph=True, backend="eager")(x, given)
    assert same(out, expected[0]) and memory(part) == memory(expected[1]) and memory(made) == memory(weight)
    assert part.transposed and not made.transposed and made.group == weight.group


def test_one_graph_for_any_number_of_experts():
    graphs = []
    compiled = torch.compile(lambda weight: (weight.codes.int().sum() + weight.shape[0], weight.mT), fullgraph=True, dynamic=True,
                             backend=lambda graph, inputs: graphs.append(graph) or graph)
    for num_experts in (3, 5, 7):
        total, turned = compiled(random_weight("mxfp4", (num_experts, 4, 64)))
        assert turned.shape == (num_experts, 64, 4) and total == turned.codes.int().sum() + num_experts
    assert len(graphs) == 1


@pytest.mark.full
def test_exports():
    class Shifted(torch.nn.Module):
        def forward(self, x, weight):
            return x + weight.dequantize().nan_to_num().sum() + weight.shape[1]

    x, weight = torch.randn(3), random_weight("int4", zeros=True)
    exported = torch.export.export(Shifted(), (x, weight)).module()
    other = random_weight("int4", zeros=True, seed=1)
    assert torch.equal(exported(x, other), Shifted()(x, other))


@pytest.mark.parametrize("format, options", [("mxfp4", {}), ("nvfp4", {}), ("int4", dict(group=(1, 16), symmetric=False))])
def test_description(format, options):
    """JSON has it, and a weight without values is made of it."""
    weight = moe_xe.QuantizedWeight.quantize(torch.randn(2, 6, 32), format, **options).mT
    empty = moe_xe.QuantizedWeight.of_description(json.loads(json.dumps(weight.description())), "meta")
    assert empty.description() == weight.description() and empty.shape == weight.shape and empty.device.type == "meta"
