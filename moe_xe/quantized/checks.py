"""What is wrong with the fields of a quantised weight. Only dtypes, sizes and strides are looked at: nothing waits for a device."""
from __future__ import annotations

import torch

from ..plan.formats import FORMATS, Codes, ScaleType, WeightFormat
from .encoding import CODE_DTYPES, SCALE_DTYPES

__all__ = ["all_numbers", "check_dtype", "check_format", "check_group", "check_numbers", "check_shape", "check_tensor", "check_weight",
           "has_numbers_only", "is_contiguous_within_experts", "scale_type", "shape_of"]


def shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_format(format) -> WeightFormat:
    if not isinstance(format, str):
        raise TypeError(f"format must be a str, got {type(format).__name__}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def check_group(format: str, group, name: str = "group") -> tuple[int, int]:
    """The group as a tuple."""
    own = FORMATS[format].group
    if group is None and own is None:
        raise TypeError(f"{name} must be (gn, gk), as {format} has none of its own, got None")
    if group is None:
        return own
    if not isinstance(group, (tuple, list)) or len(group) != 2 or not all(map(_is_int, group)):
        raise TypeError(f"{name} must be two ints (gn, gk), got {group!r}")
    group = tuple(group)
    if min(group) < 1:
        raise ValueError(f"{name} must be positive, got {group}")
    if own is not None and group != own:
        raise ValueError(f"{name} must be {own} for {format}, got {group}")
    return group


def scale_type(format: str, name: str, dtype: torch.dtype) -> ScaleType:
    """Of scales of a dtype; TypeError if the format cannot have such."""
    for kind in FORMATS[format].scales:
        if dtype in SCALE_DTYPES[kind]:
            return kind
    possible = [dtype for kind in FORMATS[format].scales for dtype in SCALE_DTYPES[kind]]
    raise TypeError(f"{name} must be {_either(possible)} for {format}, got {dtype}")


def check_weight(weight) -> None:
    """TypeError or ValueError naming the field; format and group are checked."""
    scheme, (rows, columns) = FORMATS[weight.format], weight.group
    codes, per_byte = weight.codes, 8 // scheme.codes.bits
    check_tensor("codes", codes, 3, f"[E, N, {'K / 2' if per_byte == 2 else 'K'}]")
    if codes.dtype not in CODE_DTYPES[scheme.codes]:
        raise TypeError(f"codes must be {_either(CODE_DTYPES[scheme.codes])} for {weight.format}, got {codes.dtype}")
    _check_contiguous("codes", codes, is_contiguous_within_experts(codes), " within an expert")
    num_experts, n, row_bytes = codes.shape
    grid = (num_experts, -(-n // rows), -(-row_bytes * per_byte // columns))
    check_tensor("scales", weight.scales, 3, "[E, ceil(N / gn), ceil(K / gk)]")
    scale_type(weight.format, "scales", weight.scales.dtype)
    _check_beside(codes, "scales", weight.scales, grid)
    if weight.zeros is not None:
        check_tensor("zeros", weight.zeros, 3, "[E, ceil(N / gn), ceil(K / gk)]")
        if not scheme.can_have_zeros:
            raise ValueError(f"zeros must be None for {weight.format}, got {shape_of(weight.zeros)}")
        if weight.zeros.dtype != weight.scales.dtype:
            raise TypeError(f"zeros must have the scales' dtype {weight.scales.dtype}, got {weight.zeros.dtype}")
        _check_beside(codes, "zeros", weight.zeros, grid)
    if weight.global_scales is not None:
        check_tensor("global_scales", weight.global_scales, 1, "[E]")
        if weight.global_scales.dtype != torch.float32:
            raise TypeError(f"global_scales must be torch.float32, got {weight.global_scales.dtype}")
        _check_beside(codes, "global_scales", weight.global_scales, (num_experts,))
    for name in ("transposed", "finite"):
        if not isinstance(getattr(weight, name), bool):
            raise TypeError(f"{name} must be a bool, got {type(getattr(weight, name)).__name__}")


def check_numbers(weight) -> None:
    """ValueError where codes are NaN or infinite, naming the first. Waits for the device."""
    if (place := _first_no_number(weight)) is not None:
        expert, row, column = place
        raise ValueError(f"codes must be finite numbers, but codes[{expert}, {row}, {column}] is "
                         f"{int(weight.codes[expert].view(torch.uint8)[row, column]):#04x} in {weight.format}")


def all_numbers(format: str) -> bool:
    """Whether every code of the format is a finite number."""
    return FORMATS[format].codes not in _NO_NUMBERS


def has_numbers_only(weight) -> bool:
    """Whether all codes are finite numbers. Waits for the device, unless the format has no others."""
    return _first_no_number(weight) is None


def _first_no_number(weight) -> tuple[int, int, int] | None:
    if all_numbers(weight.format):
        return None
    size, least = _NO_NUMBERS[FORMATS[weight.format].codes]
    for expert in range(weight.num_experts):        # little memory is needed besides
        wrong = (weight.codes[expert].view(torch.uint8) & size) >= least
        if wrong.any():
            return expert, *wrong.nonzero()[0].tolist()
    return None


_NO_NUMBERS = {Codes.e4m3: (0x7F, 0x7F), Codes.e5m2: (0x7F, 0x7C)}     # the bits of a code's size, and the least that is none


def check_tensor(name: str, tensor, dims: int | None, layout: str) -> None:
    """dims: how many dimensions it has; None for any number."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else f'layout {tensor.layout}'}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got {shape_of(tensor)}")


def check_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {_either(dtypes)}, got {tensor.dtype}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], beside: str) -> None:
    """ValueError unless it has this shape, which `beside` asks for."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)} for {beside}, got {shape_of(tensor)}")


def _check_contiguous(name: str, tensor: torch.Tensor, contiguous: bool, where: str = "") -> None:
    if not contiguous:
        raise ValueError(f"{name} must be contiguous{where}, got strides {list(tensor.stride())}: call its contiguous()")


def is_contiguous_within_experts(tensor: torch.Tensor) -> bool:
    _, row_stride, stride = tensor.stride()
    _, rows, columns = tensor.shape
    return (stride == 1 or columns <= 1) and (row_stride == max(columns, 1) or rows <= 1)


def _check_beside(codes: torch.Tensor, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    check_shape(name, tensor, shape, f"codes {list(codes.shape)}")
    _check_contiguous(name, tensor, tensor.is_contiguous())
    if tensor.device != codes.device:
        raise ValueError(f"{name} must be on the codes' device {codes.device}, got {tensor.device}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _either(dtypes) -> str:
    *most, last = map(str, dtypes)
    return f"{', '.join(most)} or {last}" if most else last
