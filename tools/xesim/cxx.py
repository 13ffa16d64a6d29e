"""Builds a shared library from C++ sources on first use, for this machine's CPU, and keeps it in the user's cache."""
from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moe_xe.private_folder import open_private

# -frounding-math: kernels switch the rounding mode through cr0
FLAGS = ("-std=c++20", "-O2", "-march=native", "-frounding-math", "-fno-math-errno", "-Wall", "-Wextra", "-fPIC")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "xesim")


def build(library: str, sources: Sequence[Path], also: Sequence[Path], flags: Sequence[str] = (), link: Sequence[str] = (),
          generate: Callable[[Path], None] = lambda folder: None) -> Path:
    """The library of this file name, built anew whenever a source, a file of `also` or this machine's CPU differs.

    generate: writes into a folder what the sources include. Raises subprocess.CalledProcessError where g++ fails.
    """
    digest = hashlib.sha256(" ".join((*FLAGS, *flags, *link)).encode())
    for file in (*sources, *also):
        digest.update(file.read_bytes())
    digest.update(next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "").encode())
    builds = cache_folder() / "build"
    folder = open_private(builds, create=True)      # it is loaded into this process
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)       # one process builds, the others wait for it
        built = builds / digest.hexdigest()[:16]
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=builds) as work:
                _compile(Path(work), library, sources, flags, link, generate)
                os.rename(Path(work, "out"), built)
        return built / library
    finally:
        os.close(folder)


def _compile(work: Path, library: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str],
             generate: Callable[[Path], None]) -> None:
    compiler = os.environ.get("CXX", "g++")
    generate(work)
    folders = sorted({source.parent for source in sources})
    objects = [work / f"{number}.o" for number in range(len(folders))]

    def compile_all_of(folder: Path, target: Path) -> None:
        # As one source: most of the time goes into headers that all of them include.
        joined = target.with_suffix(".cpp")
        joined.write_text("".join(f'#include "{source}"\n' for source in sources if source.parent == folder))
        subprocess.run([compiler, *FLAGS, *flags, f"-I{work}", "-c", joined, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_all_of, folders, objects))
    Path(work, "out").mkdir()
    subprocess.run([compiler, "-shared", "-o", work / "out" / library, *objects, *link], check=True)
