"""Operands that end where memory ends: a read beyond them is a fault."""
import ctypes
import mmap

import torch
from hypothesis import settings

settings.register_profile("compiling")      # of conftest.py, which programs outside pytest do not read


def before_a_hole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one before memory that cannot be accessed."""
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError("mprotect failed")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)
