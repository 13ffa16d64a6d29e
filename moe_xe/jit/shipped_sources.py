"""The device sources that come with the package: sycl_kernels/include and sycl_kernels/kernels."""
from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from ..once import once

_PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def sources_dir() -> Path:
    """The folder with include/ and kernels/: inside an installed package, or the repository's."""
    for folder in (_PACKAGE / "_sycl_kernels", _PACKAGE.parent / "sycl_kernels"):
        if (folder / "include").is_dir():
            return folder
    raise FileNotFoundError(f"moe_xe's kernel sources are missing beside {_PACKAGE}; reinstall the package")


@once
def sources_digest() -> str:
    """SHA-256 of every shipped source, names and contents."""
    digest = hashlib.sha256()
    root = sources_dir()
    for part in ("include", "kernels"):
        for path in sorted((root / part).rglob("*")):
            if path.is_file():
                contents = path.read_bytes()
                digest.update(f"{path.relative_to(root)}\0{len(contents)}\0".encode() + contents)
    return digest.hexdigest()
