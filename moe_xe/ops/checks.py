"""What is wrong with a call's arguments, said before anything is launched."""
from __future__ import annotations

import numbers
import operator

import torch

from ..plan.problem import Dtype, WeightLayout
from ..quantized.weight import QuantizedWeight

DTYPES = {torch.bfloat16: Dtype.bf16, torch.float16: Dtype.f16, torch.float32: Dtype.f32}
A_DTYPES = {**DTYPES, torch.int8: Dtype.i8}
TORCH_DTYPES = {dtype: torch_dtype for torch_dtype, dtype in DTYPES.items()}
_DTYPE_NAMES = "bfloat16, float16 or float32"
FLOAT32_MAX, FLOAT32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def holds(condition) -> bool:
    """Whether a condition on sizes holds. Of sizes that only the run of a compiled graph will tell, it is handed to torch, which
    checks it in the graph."""
    if not _is_symbolic(condition):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true     # takes 0.4 s to import
    if guard_or_false(condition):
        return True
    if not guard_or_true(condition):
        return False
    torch._check(condition)
    return True


def surely(condition) -> bool:
    """Whether a condition on sizes is known to hold: false for those that only the run of a compiled graph will tell."""
    if not _is_symbolic(condition):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false
    return guard_or_false(condition)


def _is_symbolic(condition) -> bool:
    return torch.compiler.is_compiling() or isinstance(condition, torch.SymBool)


def shown(value) -> str:
    """A value for a message; of a number with very many digits, its length."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def check_count(name: str, value, least: int, most: int) -> int:
    """Anything that Python takes as an index, as an int; TypeError, or ValueError outside [least, most]."""
    if isinstance(value, bool) or not (isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not isinstance(value, (int, torch.SymInt)):
        value = operator.index(value)
    if not holds(value >= least) or not holds(value <= most):
        raise ValueError(f"{name} must be from {least} to {most}, got {shown(value)}")
    return value


def check_flags(**flags) -> None:
    """TypeError for a flag that is no bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def check_float32(name: str, value, positive: bool = False) -> float:
    """A number that float32 can hold: finite and, if it must be positive, not so small that it becomes zero."""
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    least = FLOAT32_TINY if positive else -FLOAT32_MAX
    if not least <= value <= FLOAT32_MAX:
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite in float32, got {name} = {shown(value)}")
    return float(value)


def shape_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_tensor(name: str, tensor, dims: int, layout: str) -> None:
    """TypeError unless it is a tensor, ValueError unless it has `dims` dimensions; `layout` names them."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions {layout}, got {shape_of(tensor)}")


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """TypeError unless its elements lie in memory at strides, as they are."""
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if tensor.is_quantized:
        raise TypeError(f"{name} must be a plain tensor, got a quantized one, {tensor.dtype}")


def check_dtype(name: str, dtype: torch.dtype) -> Dtype:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {dtype}")
    return DTYPES[dtype]


def check_same_dtype(name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {tensor.dtype}")


def check_weight_type(name: str, w) -> None:
    """TypeError unless it is a tensor of a dtype that weights can have, or quantised."""
    if isinstance(w, QuantizedWeight):
        return
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a moe_xe.QuantizedWeight, got {type(w).__name__}")
    if w.dtype not in DTYPES:
        quantised = "" if w.dtype == torch.float64 else "; a quantised weight is a moe_xe.QuantizedWeight, with its scales"
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {w.dtype}{quantised}")


def check_same_device(**tensors: torch.Tensor | None) -> torch.device:
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, device), *rest = given.items()
    for name, other in rest:
        if other != device:
            raise ValueError(f"all tensors must be on one device: {first} is on {device}, {name} is on {other}")
    if device.type not in ("cpu", "xpu", "meta"):
        raise TypeError(f"moe_xe runs on xpu and cpu tensors, but {first} is on {device}")
    return device


def row_stride(name: str, tensor: torch.Tensor) -> int:
    """Elements between the rows of a 2D tensor with contiguous rows."""
    if not (surely(tensor.shape[0] == 0) or surely(tensor.shape[1] <= 1) or holds(tensor.stride(1) == 1)):
        raise ValueError(f"{name}'s rows must be contiguous (stride(1) == 1), got strides {tuple(tensor.stride())}; "
                         f"call .contiguous() on it")
    return tensor.shape[1] if surely(tensor.shape[0] <= 1) else tensor.stride(0)


def weight_layout(name: str, w: torch.Tensor) -> tuple[WeightLayout, int, int]:
    """Layout in memory, row stride and expert stride (elements) of logical [E, N, K] weights."""
    num_experts, n, k = w.shape
    expert_stride = n * k if surely(num_experts <= 1) else w.stride(0)
    if surely(k <= 1) or surely(w.stride(2) == 1):
        return WeightLayout.enk, k if surely(n <= 1) else w.stride(1), expert_stride
    if surely(n <= 1) or surely(w.stride(1) == 1):
        return WeightLayout.ekn, w.stride(2), expert_stride
    if num_experts == 0:
        return WeightLayout.enk, k, n * k
    raise ValueError(f"{name} must be contiguous in its last or last but one dimension, got strides {tuple(w.stride())}; "
                     f"call .contiguous() on it")


def has_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has this shape, of as many dimensions."""
    return all(holds(size == wanted) for size, wanted in zip(tensor.shape, shape))


def check_indices(name: str, tensor, length: int | None, what: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, tensor, 1, f"[{what}]")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if length is not None and not holds(tensor.shape[0] == length):
        raise ValueError(f"{name} must have one entry for each of the {length} {what}, got {tensor.shape[0]}")
    if not (surely(tensor.shape[0] <= 1) or holds(tensor.stride(0) == 1)):
        raise ValueError(f"{name} must be contiguous, got stride {tensor.stride(0)}; call .contiguous() on it")


def check_counts(name: str, rows, num_experts: int | None, dtypes: tuple[torch.dtype, ...], *, table: bool) -> None:
    """Counts (or ends) of experts; with `table` also [ranks, experts], whose rows may lie apart."""
    if table and isinstance(rows, torch.Tensor) and rows.dim() == 2:
        check_dense(name, rows)
        if not holds(rows.shape[0] >= 1):
            raise ValueError(f"{name} must have a row for each rank, got {shape_of(rows)}")
        rows = rows[0]
    check_indices(name, rows, num_experts, "experts", dtypes)


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
    if not has_shape(out, shape) or out.dtype != dtype:
        raise ValueError(f"out must be {str(dtype).removeprefix('torch.')}{list(shape)}, got {shape_of(out)}")
    if not holds(row_stride("out", out) >= shape[1]):
        raise ValueError(f"out's rows must not overlap, got strides {tuple(out.stride())} for {shape[1]} columns")


def check_no_gradient(out: torch.Tensor | None, **inputs: torch.Tensor | None) -> None:
    """ValueError where a gradient is asked of something written to `out`, which autograd does not see; as torch's own ops."""
    if out is None or not torch.is_grad_enabled():
        return
    for name, tensor in {"out": out, **inputs}.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise ValueError(f"out must be left out where a gradient is asked for, but {name} requires one: call it under torch.no_grad()")


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """ValueError for a tensor whose storage was freed, as FSDP leaves parameters, or cut."""
    extent = tensor.numel()
    if extent and not tensor.is_contiguous():
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    num_bytes = tensor.untyped_storage().nbytes()
    if extent and num_bytes < (tensor.storage_offset() + extent) * tensor.element_size():
        raise ValueError(f"{name} must have memory for all of its elements, got {shape_of(tensor)} on a storage of {num_bytes} bytes, "
                         f"which was freed")


def check_addresses(**tensors: torch.Tensor | None) -> None:
    """ValueError unless there is memory behind every element of each tensor, and the elements are aligned to their own size.

    Asked of addresses, so inside the op.
    """
    for name, tensor in tensors.items():
        if tensor is None or not tensor.numel():
            continue
        check_memory(name, tensor)
        address, size = tensor.data_ptr(), tensor.element_size()
        if address == tensor.storage_offset() * size:
            raise ValueError(f"{name} must have memory for all of its elements, got a {type(tensor).__name__} without an address")
        if address % size:
            raise ValueError(f"{name} must be aligned to its {size}-byte elements, got address {address:#x}; call .clone() on it")


def check_no_overlap(written: torch.Tensor, name: str = "out", /, **inputs: torch.Tensor | None) -> None:
    """ValueError where what is written to shares memory with an input (asked of the addresses, so inside the op)."""
    for other, tensor in inputs.items():
        if tensor is not None and overlaps(written, tensor):
            raise ValueError(f"{name} must not share memory with {other}")


def check_row_counts(rows: torch.Tensor, total_rows: int, name: str, batched: bool) -> None:
    """The check of values that only the device knows (it waits for them): counts not negative, sum within the rows, or each within
    its share of them."""
    counts = _values_of(name, rows)
    most = total_rows // max(len(counts), 1) if batched else total_rows
    wrong = ((counts < 0) | (counts > most if batched else False)).nonzero().tolist()
    if wrong:
        at, expected = wrong[0], f"lie in [0, max_rows], [0, {most}]" if batched else "not be negative"
        raise ValueError(f"{name} must {expected}: {name}{at} is {int(counts[tuple(at)])}")
    total = sum(counts.flatten().tolist())        # in Python's integers, which do not wrap
    if not batched and total > total_rows:
        raise ValueError(f"{name} sums to {total}, but there are only {total_rows} rows")


def check_index_values(name: str, indices: torch.Tensor, limit: int) -> None:
    """ValueError unless every index lies in [0, limit); waits for the device."""
    values = _values_of(name, indices)
    wrong = ((values < 0) | (values >= limit)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{name} must lie in [0, {limit}), but {name}[{at}] is {int(values[at])}")


def _values_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise ValueError(f"check=True looks at {name}'s values, but a meta tensor has none")
    return tensor.cpu()
