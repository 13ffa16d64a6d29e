"""What the tests share: compiled kernels, and bf16 in numpy."""
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import xesim

KERNELS = Path(__file__).parent / "kernels"


@cache
def build(src, options="", sycl=()):
    """Compiles kernels/SRC once; skips the test where tools are missing. A first line "// prepend: A" puts kernels/A in
    front of the source; a name X_nodevlib.cpp is X.cpp with the bf16 conversions in front."""
    if reason := xesim.missing_tools():
        pytest.skip(reason)
    text = (KERNELS / src.replace("_nodevlib", "")).read_text()
    first = text.splitlines()[0]
    if first.startswith("// prepend: "):
        text = (KERNELS / first[12:]).read_text() + text
    if "_nodevlib" in src:
        text = (KERNELS / "bf16_devicelib.hpp").read_text() + text
    return xesim.compile_bmg(text, options, sycl)


def bf16_from(x):
    """float32 -> bf16 bits, round to nearest even."""
    u = np.asarray(x, "f4").view("u4").astype("u8")
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("u2")


def bf16_to(b):
    """bf16 bits -> float32."""
    return (np.asarray(b, "u2").astype("u4") << 16).view("f4")
