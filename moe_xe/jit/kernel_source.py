"""What to compile."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelSource:
    """One SYCL kernel as source.

    name: an extern "C" free-function kernel (nd_range_kernel<1>) in the text.
    signature: a letter per argument: p pointer, i int32, q int64, f float.
    text: C++ that may #include <moe_xe/...>; small SYCL headers compile ten
        times faster than <sycl/sycl.hpp>.
    options: the run-time compiler's, such as "-O3" or "-DROWS=64".
    """

    name: str
    signature: str
    text: str
    options: tuple[str, ...] = ()
