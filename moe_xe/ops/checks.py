"""What is wrong with a call's arguments, said before anything is launched."""
from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

from ..plan.problem import Dtype, WeightLayout

DTYPES = {torch.bfloat16: Dtype.bf16, torch.float16: Dtype.f16, torch.float32: Dtype.f32}
_DTYPE_NAMES = "bfloat16, float16 or float32"


def shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_tensor(name: str, tensor, dims: int, layout: str) -> None:
    """TypeError unless it is a tensor, ValueError unless it has `dims` dimensions; `layout` names them."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got {shape_of(tensor)}")


def check_dtype(name: str, dtype: torch.dtype) -> Dtype:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {dtype}")
    return DTYPES[dtype]


def check_weights_dtype(name: str, w: torch.Tensor) -> None:
    """TypeError unless it is a tensor of a dtype that weights can have."""
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(w).__name__}")
    if w.dtype not in DTYPES:
        quantised = "" if w.dtype == torch.float64 else "; quantised weights are not supported"
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {w.dtype}{quantised}")


def check_none_or_all_fake(**tensors: torch.Tensor | None) -> None:
    """TypeError for fake tensors among real ones, unless their mode allows that."""
    fake = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, FakeTensor)}
    real = [name for name, tensor in tensors.items() if tensor is not None and name not in fake]
    if fake and real and not any(tensor.fake_mode.allow_non_fake_inputs for tensor in fake.values()):
        raise TypeError(f"tensors must be all fake or all real: {next(iter(fake))} is a FakeTensor, {real[0]} is not; "
                        f"FakeTensorMode(allow_non_fake_inputs=True) allows both")


def check_same_device(**tensors: torch.Tensor | None) -> torch.device:
    check_none_or_all_fake(**tensors)
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, device), *rest = given.items()
    for name, other in rest:
        if other != device:
            raise ValueError(f"all tensors must be on one device: {first} is on {device}, {name} is on {other}")
    if device.type not in ("cpu", "xpu"):
        raise TypeError(f"moe_xe runs on xpu and cpu tensors, but {first} is on {device}")
    return device


def row_stride(name: str, tensor: torch.Tensor) -> int:
    """Elements between the rows of a 2D tensor with contiguous rows."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(f"{name}'s rows must be contiguous (stride(1) == 1), got strides {tuple(tensor.stride())}; "
                         f"call .contiguous() on it")
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]


def weight_layout(name: str, w: torch.Tensor) -> tuple[WeightLayout, int, int]:
    """Layout in memory, row stride and expert stride (elements) of logical [E, N, K] weights."""
    num_experts, n, k = w.shape
    expert_stride = w.stride(0) if num_experts > 1 else n * k
    if k == 1 or w.stride(2) == 1:
        return WeightLayout.enk, w.stride(1) if n > 1 else k, expert_stride
    if n == 1 or w.stride(1) == 1:
        return WeightLayout.ekn, w.stride(2), expert_stride
    raise ValueError(f"{name} must be contiguous in its last or last but one dimension, got strides {tuple(w.stride())}; "
                     f"call .contiguous() on it")


def check_indices(name: str, tensor, length: int | None, what: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, tensor, 1, f"[{what}]")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if length is not None and tensor.shape[0] != length:
        raise ValueError(f"{name} must have one entry for each of the {length} {what}, got {tensor.shape[0]}")
    if tensor.shape[0] > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got stride {tensor.stride(0)}; call .contiguous() on it")


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a tensor touches."""
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()


def overlaps(x: torch.Tensor, y: torch.Tensor) -> bool:
    """True where two tensors may share bytes (exact for rows of the same pitch, such as two slices of one matrix)."""
    if not x.numel() or not y.numel():
        return False
    (x_begin, x_end), (y_begin, y_end) = _extent(x), _extent(y)
    if x_end <= y_begin or y_end <= x_begin:
        return False
    pitch = x.stride(0) * x.element_size()
    if x.dim() == y.dim() == 2 and pitch == y.stride(0) * y.element_size() and pitch > 0:
        x_width, y_width = x.shape[1] * x.element_size(), y.shape[1] * y.element_size()
        shift = (y_begin - x_begin) % pitch
        return shift < x_width or shift + y_width > pitch
    return True


def check_out(out, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """`out` is a [rows, N] tensor with contiguous, distinct rows."""
    check_tensor("out", out, 2, "[total_rows, N]")
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"out must be {str(dtype).removeprefix('torch.')}{list(shape)}, got {shape_of(out)}")
    if row_stride("out", out) < shape[1]:
        raise ValueError(f"out's rows must not overlap, got strides {tuple(out.stride())} for {shape[1]} columns")


def check_addresses(**tensors: torch.Tensor | None) -> None:
    """ValueError for a tensor whose elements are not aligned to their own size (asked of addresses, so inside the op)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % tensor.element_size():
            raise ValueError(f"{name} must be aligned to its {tensor.element_size()}-byte elements, got address "
                             f"{tensor.data_ptr():#x}; call .clone() on it")


def check_no_overlap(out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """ValueError where `out` shares memory with an input (asked of the addresses, so inside the op)."""
    for name, tensor in inputs.items():
        if tensor is not None and overlaps(out, tensor):
            raise ValueError(f"out must not share memory with {name}")


def check_row_counts(rows: torch.Tensor, total_rows: int, name: str, ends: bool) -> None:
    """The check of values that only the device knows (it waits for them): counts not negative, sum within the rows."""
    values = rows.cpu().to(torch.int64)
    counts = torch.diff(values, prepend=values.new_zeros(1)) if ends else values
    if (counts < 0).any():
        expert = int((counts < 0).nonzero()[0])
        expected = "must not fall" if ends else "must not be negative"
        raise ValueError(f"{name} {expected}: {name}[{expert}] is {int(values[expert])}")
    if int(counts.sum()) > total_rows:
        what = "ends at" if ends else "sums to"
        raise ValueError(f"{name} {what} {int(counts.sum())}, but there are only {total_rows} rows")


def check_index_values(name: str, indices: torch.Tensor, limit: int) -> None:
    """ValueError unless every index lies in [0, limit); waits for the device."""
    values = indices.cpu()
    wrong = ((values < 0) | (values >= limit)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{name} must lie in [0, {limit}), but {name}[{at}] is {int(values[at])}")
