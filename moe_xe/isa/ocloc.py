"""SPIR-V -> Xe machine code, disassembled, with Intel's offline compiler; results are kept on disk."""
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ..disk_cache import DIRECTORY_VARIABLE, cache_directory
from ..private_folder import open_private
from .dump import Dump

OVERRIDE = "MOE_XE_OCLOC"      # an ocloc executable, or a folder that tools/install-ocloc made
DEVICES = {"bmg": "bmg-g21", "lnl": "lnl-m", "ptl": "ptl-h"}      # short names; others are ocloc's own: pvc, cri, ...
_STALE_S = 3600     # ocloc takes seconds: what is unfinished for so long was left by a killed process


class OclocError(RuntimeError):
    """ocloc failed; the message holds what it printed."""


def build(spirv: bytes, device: str, options: str = "") -> Dump:
    """Machine code of a SPIR-V module for a device ("bmg", "pvc", "lnl-m", "ptl-h", "cri", ...), as a dump.

    options: build options of the device compiler, as the driver takes them ("-ze-intel-256-GRF-per-thread").
    The dump lies in the cache ($MOE_XE_CACHE_DIR/ocloc) under a name made from all inputs; read it only.
    Raises FileNotFoundError where there is no ocloc, OclocError if the module does not compile or others can write to the cache.
    """
    if (ocloc := find()) is None:
        raise FileNotFoundError(missing())
    device = DEVICES.get(device, device)
    executable = Path(ocloc[-1])
    identity = f"{executable}:{executable.stat().st_mtime_ns}"
    key = hashlib.sha256(b"\0".join([spirv, device.encode(), options.encode(), identity.encode()])).hexdigest()[:32]
    final = _dumps() / key
    if not final.exists():
        with tempfile.TemporaryDirectory(prefix=key, suffix=".work", dir=final.parent) as work:
            _build(ocloc, Path(work), spirv, device, options)
            try:
                os.rename(Path(work, "dump"), final)
            except OSError:
                if not final.exists():       # else another process was faster
                    raise
    return Dump(final)


def _dumps() -> Path:
    """The folder of all dumps, without what killed processes left."""
    folder = cache_directory() / "ocloc"
    try:
        os.close(open_private(folder, create=True))
    except PermissionError as error:
        raise OclocError(f"dumps cannot be kept: {error}; {DIRECTORY_VARIABLE} names another place") from error
    for unfinished in folder.glob("*.work"):
        with suppress(FileNotFoundError):       # another process may be faster
            if unfinished.stat().st_mtime < time.time() - _STALE_S:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def missing() -> str:
    """What build lacks on this machine, and how to get it; "" if nothing."""
    return "" if find() else f"ocloc was not found: run tools/install-ocloc, or put it on PATH or into ${OVERRIDE}"


def find() -> list[str] | None:
    """The command that starts ocloc: $MOE_XE_OCLOC, the private root, or PATH (in this order); None without one."""
    if override := os.environ.get(OVERRIDE):
        path = Path(override)
        return _in_root(path) if path.is_dir() else [str(path)] if path.exists() else None
    on_path = shutil.which("ocloc")
    return _in_root(private_root()) or ([on_path] if on_path else None)


def private_root() -> Path:
    """Where tools/install-ocloc puts a recent ocloc with all that it needs."""
    return cache_folder() / "xesim" / "ocloc-root"


def cache_folder() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _in_root(root: Path) -> list[str] | None:
    """ocloc of a private Debian root, started with that root's loader and libraries: no chroot, no privileges."""
    executables = sorted(root.glob("usr/bin/ocloc-*"))
    if not (root / ".complete").exists() or not executables:
        return None
    return [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(root / "usr/lib/x86_64-linux-gnu"), str(executables[-1])]


def _build(ocloc: list[str], work: Path, spirv: bytes, device: str, options: str) -> None:
    (work / "k.spv").write_bytes(spirv)
    log = _run(ocloc, work, ["compile", "-file", "k.spv", "-spirv_input", "-device", device, "-out_dir", "bin",
                             *(["-options", options] if options else [])])
    binaries = list((work / "bin").glob("*.bin")) if (work / "bin").exists() else []
    if len(binaries) != 1:
        raise OclocError(f"ocloc compiled nothing for {device}:\n{log}")
    log += _run(ocloc, work, ["disasm", "-file", str(binaries[0]), "-device", device, "-dump", "dump"])
    if not (work / "dump" / ".ze_info").exists():
        raise OclocError(f"ocloc disasm failed for {device}:\n{log}")
    shutil.copy(binaries[0], work / "dump" / "image.bin")
    (work / "dump" / "log.txt").write_text(log)


def _run(ocloc: list[str], work: Path, arguments: list[str]) -> str:
    done = subprocess.run([*ocloc, *arguments], cwd=work, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout
