"""Experts' weights in 4 or 8 bits."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.utils import _pytree as pytree

from ..plan.formats import FORMATS, Quantization
from . import checkpoints, compressed_tensors, join, torchao
from .checks import all_numbers, check_format, check_group, check_weight, has_numbers_only, scale_type, shape_of
from .encoding import SCALE_DTYPES, decode, decode_scales, each
from .quantize import quantize, usual_group

__all__ = ["QuantizedWeight"]

_ALIGNMENT = 64     # bytes


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A weight [E, N, K] as codes, and scales of their groups: ``(number(code) - zero) * scale``, times the expert's global scale.

    codes: as checkpoints have them. 4 bits (mxfp4, nvfp4, int4, uint4): uint8 [E, N, K / 2], the lower k in a byte's low half. 8 bits,
    [E, N, K]: int8; float8_e4m3fn for fp8_e4m3 and mxfp8, float8_e5m2 for fp8_e5m2, or their bytes as uint8.
    scales: [E, ceil(N / gn), ceil(K / gk)]; the last groups may be short. float32, float16 or bfloat16; for mxfp4 and mxfp8, and fp8 that
    has such, powers of two, float8_e8m0fnu or its bytes as uint8; for nvfp4 float8_e4m3fn, or its bytes.
    zeros: what code is zero, for each group, as the scales; int4, uint4 and int8 only. Without, 8 for uint4, else 0.
    global_scales: [E], float32; they multiply.
    format: of `moe_xe.plan.formats.FORMATS`. group: (gn, gk), rows and columns of codes that share a scale; (1, 32) for mxfp4 and mxfp8,
    (1, 16) for nvfp4.
    transposed: the weight is [E, K, N], the transpose of what the codes say.
    finite: whether all codes are known to be finite numbers; `quantize` and `prepacked` know, and so does each format without others. Where FP8
    codes are not, Xe's kernels look for such as are no numbers (docs/quantised.md).

    All are contiguous, codes within an expert. A plain value: nothing is copied, and it is a node of torch's pytrees.
    Raises TypeError or ValueError naming the field.
    """
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    global_scales: torch.Tensor | None = None
    format: str = ""
    group: tuple[int, int] | None = None
    transposed: bool = False
    finite: bool = False

    PARTS: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "global_scales")    # what lies in memory
    JOINED: ClassVar[tuple[str, ...]] = ("format", "group", "transposed", "finite")     # the rest

    def __post_init__(self):
        check_format(self.format)
        object.__setattr__(self, "group", check_group(self.format, self.group))
        check_weight(self)
        object.__setattr__(self, "finite", self.finite or all_numbers(self.format))

    @property
    def shape(self) -> torch.Size:
        """[E, N, K], or [E, K, N] if it is transposed."""
        num_experts, n, row_bytes = self.codes.shape
        k = row_bytes * 8 // FORMATS[self.format].codes.bits
        return torch.Size((num_experts, k, n) if self.transposed else (num_experts, n, k))

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes, scales, zeros and global scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> Quantization:
        """What a kernel is compiled for."""
        scheme = FORMATS[self.format]
        return Quantization(scheme.codes, scale_type(self.format, "scales", self.scales.dtype), *self.group, zero=scheme.zero,
                            zeros=self.zeros is not None, global_scales=self.global_scales is not None, finite=self.finite)

    @property
    def mT(self) -> QuantizedWeight:
        """The transpose, of the same memory."""
        return replace(self, transposed=not self.transposed)

    def transpose(self, dim0: int, dim1: int) -> QuantizedWeight:
        """`mT`: dim0 and dim1 are the last two dimensions."""
        if not {dim0, dim1} <= {-2, -1, 1, 2} or {dim0 % 3, dim1 % 3} != {1, 2}:
            raise ValueError(f"dim0 and dim1 must be the last two dimensions, 1 and 2, got {dim0} and {dim1}")
        return self.mT

    def __getitem__(self, experts: slice) -> QuantizedWeight:
        """A slice of experts, of the same memory."""
        if not isinstance(experts, slice):
            raise TypeError(f"a QuantizedWeight is indexed with a slice of experts, got {type(experts).__name__}")
        if experts.step not in (None, 1):
            raise ValueError(f"a slice of experts must have step 1, got {experts.step}")
        return self._map(lambda tensor: tensor[experts])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> QuantizedWeight:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def contiguous(self) -> QuantizedWeight:
        return self._map(torch.Tensor.contiguous)

    def prepacked(self) -> QuantizedWeight:
        """What kernels like best, for a weight that stays: contiguous, aligned to 64 bytes, and `finite` if it is. Itself, if it is so:
        kernels read every layout as it lies, and no order of codes is better than the checkpoint's.

        Looks at FP8 codes that are not known to be finite, and so waits for the device."""
        looked = self if self.finite or not has_numbers_only(self) else replace(self, finite=True)
        if all(map(_is_aligned, self.tensors.values())):
            return looked
        return looked._map(lambda tensor: tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a dense tensor of its shape, in float32, float16, bfloat16 or float64.

        Computed in float32, for float64 in that: with scales of 8 or 16 bits, zeros that are integers and no global scales, the exact
        number rounded once. A code or a scale that is NaN gives NaN.
        """
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = self.quantization
        num_experts, n, k = replace(self, transposed=False).shape
        dense = torch.empty((num_experts, n, k), dtype=dtype, device=self.device)
        for e in range(num_experts):        # little memory is needed besides
            zero = wanted.zero if self.zeros is None else each(self.zeros[e].to(computed), self.group, (n, k))
            scale = each(decode_scales(wanted.scales, self.scales[e], computed), self.group, (n, k))
            numbers = (decode(wanted.codes, self.codes[e], computed) - zero) * scale
            dense[e] = numbers if self.global_scales is None else numbers * self.global_scales[e]
        return dense.mT if self.transposed else dense

    @classmethod
    def quantize(cls, w: torch.Tensor, format: str, group: tuple[int, int] | None = None, *, scale_dtype: torch.dtype | None = None,
                 symmetric: bool = True) -> QuantizedWeight:
        """The nearest codes of a dense weight, ties to even, with scales by each group's largest magnitude.

        w: [E, N, K], float32, float16 or bfloat16, finite; K is even for 4 bits. group: by default the format's, else (1, 128), for fp8
        (128, 128). scale_dtype: by default the first of the format's, float32 where there is a choice.

        A scale is the largest magnitude over the largest number of a code (7 for int4 and uint4, 127, 6, 448, 57344), rounded to its
        dtype, and at least that number times the dtype's smallest. nvfp4's have a global scale: the expert's largest magnitude over
        448 * 6. Each number is off by at most half the distance of the codes around it, times scales, and float32's rounding.
        Powers of two are OCP's, 2^(floor(log2(largest magnitude)) - floor(log2(largest number of a code))): larger numbers than the
        largest code are cut to it, by up to a quarter (4 bits) or an eighth (8 bits) of them.
        symmetric=False, for int4, uint4 and int8: zeros, too: scale (max - min) / (2^bits - 1), of a group's numbers and 0, and the zero
        that -min / scale rounds to. Numbers are off by at most one scale; int8's, with bfloat16 scales, by one and a half.

        Raises TypeError or ValueError naming the argument.
        """
        scheme = check_format(format)
        group = check_group(format, usual_group(scheme) if group is None else group)
        if not isinstance(w, torch.Tensor) or w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"w must be a float32, float16 or bfloat16 tensor [E, N, K], got {getattr(w, 'dtype', type(w).__name__)}")
        if w.dim() != 3:
            raise ValueError(f"w must have 3 dimensions [E, N, K], got {shape_of(w)}")
        if scheme.codes.bits == 4 and w.shape[2] % 2:
            raise ValueError(f"w must have an even K for {format}, whose codes lie two in a byte, got {shape_of(w)}")
        if not isinstance(symmetric, bool):
            raise TypeError(f"symmetric must be a bool, got {type(symmetric).__name__}")
        if not symmetric and not scheme.can_have_zeros:
            raise ValueError(f"symmetric must be True for {format}, which has no zeros, got False")
        scale_dtype = SCALE_DTYPES[scheme.scales[0]][0] if scale_dtype is None else scale_dtype
        scales = scale_type(format, "scale_dtype", scale_dtype)
        return cls(**quantize(w, format, group, scales, scale_dtype, symmetric), format=format, group=group, finite=True)

    # by the names of checkpoints' tensors
    from_gpt_oss = classmethod(checkpoints.from_gpt_oss)
    from_fp8_block = classmethod(checkpoints.from_fp8_block)
    from_fp8 = classmethod(checkpoints.from_fp8)
    from_gptq = classmethod(checkpoints.from_gptq)
    from_awq = classmethod(checkpoints.from_awq)
    from_modelopt = classmethod(checkpoints.from_modelopt)
    from_compressed_tensors = classmethod(compressed_tensors.from_compressed_tensors)
    from_torchao = classmethod(torchao.from_torchao)
    cat = classmethod(join.cat)

    def description(self) -> dict:
        """All but the values, as JSON has it: format, group, transposed, and dtype and shape of each tensor."""
        return {"format": self.format, "group": list(self.group), "transposed": self.transposed, "tensors": {
            name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in self.tensors.items()}}

    @classmethod
    def of_description(cls, description: dict, device: torch.device | str) -> QuantizedWeight:
        """A weight without values of what `description` returned."""
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype), device=device) for name, (dtype, shape) in description["tensors"].items()}
        return cls(**tensors, **{name: description[name] for name in ("format", "group", "transposed")})

    def __repr__(self) -> str:
        more = "".join(f", {name}" for name in ("zeros", "global_scales") if getattr(self, name) is not None)
        return (f"QuantizedWeight({self.format} {list(self.shape)}, scales {shape_of(self.scales)} of {self.group}{more}"
                f"{', transposed' if self.transposed else ''}, {self.device})")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of its parts that there are, by name."""
        return {name: getattr(self, name) for name in self.PARTS if getattr(self, name) is not None}

    def _map(self, function) -> QuantizedWeight:
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors.items()})


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _flatten(weight: QuantizedWeight):
    return [getattr(weight, name) for name in weight.PARTS], tuple(getattr(weight, name) for name in weight.JOINED)


def _flatten_with_keys(weight: QuantizedWeight):
    tensors, plain = _flatten(weight)
    return [(pytree.GetAttrKey(name), tensor) for name, tensor in zip(weight.PARTS, tensors)], plain


def _unflatten(tensors, plain) -> QuantizedWeight:
    """Without checks: a pytree's leaves may be anything."""
    weight = object.__new__(QuantizedWeight)
    for name, value in zip(weight.PARTS + weight.JOINED, (*tensors, *plain)):
        object.__setattr__(weight, name, value)
    return weight


pytree.register_pytree_node(QuantizedWeight, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
                            serialized_type_name="moe_xe.QuantizedWeight")
