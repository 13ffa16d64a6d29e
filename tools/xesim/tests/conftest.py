import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))

import xesim  # noqa: E402

_builds = {}


def build(src, options="", sycl=()):
    """Compiles tests/kernels/SRC once. A first line "// prepend: A" puts kernels/A in front of the source; a name
    X_nodevlib.cpp is X.cpp with the bf16 conversions in front."""
    key = (src, options, tuple(sycl))
    if key not in _builds:
        d = HERE / "kernels"
        text = (d / src.replace("_nodevlib", "")).read_text()
        first = text.splitlines()[0]
        if first.startswith("// prepend: "):
            text = (d / first[12:]).read_text() + text
        if "_nodevlib" in src:
            text = (d / "bf16_devicelib.hpp").read_text() + text
        _builds[key] = xesim.compile_bmg(text, options, sycl)
    return _builds[key]


def bf16_from(x):
    """float32 -> bf16 bits, round to nearest even."""
    u = np.asarray(x, "f4").view("u4").astype("u8")
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("u2")


def bf16_to(b):
    return (np.asarray(b, "u2").astype("u4") << 16).view("f4")
