"""Compiled kernels on disk, shared by processes.

A cache must never cost its user a result: every failure here is a warning,
once, and a kernel compiled again.

The entries are machine code, so whoever may write the folder may run code as
its user; it is created for its owner alone.
"""
from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import warnings
from pathlib import Path

import diskcache
import platformdirs

from .cache_key import KeyFacts, key_of

DIRECTORY_VARIABLE = "MOE_XE_CACHE_DIR"
SIZE_VARIABLE = "MOE_XE_CACHE_SIZE"
DEFAULT_SIZE = 1 << 30  # bytes

_TIMEOUT_S = 5.0


class _RawDisk(diskcache.Disk):
    """diskcache unpickles what it finds; kernels are plain bytes and nothing else is read."""

    def fetch(self, mode, filename, value, read):
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
            raise ValueError("not an entry of moe_xe")
        return super().fetch(mode, filename, value, read)


def _pack(facts: KeyFacts, binary: bytes) -> bytes:
    header = {"facts": facts, "sha256": hashlib.sha256(binary).hexdigest()}
    return json.dumps(header).encode() + b"\n" + binary


def _unpack(facts: KeyFacts, entry: bytes) -> bytes:
    """Raises ValueError unless the entry is whole and was stored for these facts."""
    header_line, _, binary = entry.partition(b"\n")
    header = json.loads(header_line)
    if header != {"facts": facts, "sha256": hashlib.sha256(binary).hexdigest()}:
        raise ValueError("damaged, or of another kernel")
    return binary


class DiskCache:
    """Least recently used kernels leave when the size limit is reached.

    Neither load, store nor drop raises for anything that the disk does.
    """

    def __init__(self, directory: Path, size_limit: int = DEFAULT_SIZE):
        self.directory = directory
        self._cache = None
        self._warned = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._cache = diskcache.Cache(
                str(directory),
                disk=_RawDisk,
                timeout=_TIMEOUT_S,
                size_limit=size_limit,
                eviction_policy="least-recently-used",
                cull_limit=2,  # as many leave at once; the default of 10 could be all of them
            )
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            self._warn("cannot be opened", error)

    def load(self, facts: KeyFacts) -> bytes | None:
        """The binary stored for these facts; None where there is none that can be trusted."""
        if self._cache is None:
            return None
        try:
            entry = self._cache.get(key_of(facts))
            return None if entry is None else _unpack(facts, entry)
        except diskcache.Timeout:
            return None  # other processes are busy with the database
        except (ValueError, TypeError, AttributeError):
            self.drop(facts)
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be read", error)
        return None

    def store(self, facts: KeyFacts, binary: bytes) -> None:
        if self._cache is None:
            return
        try:
            self._cache.set(key_of(facts), _pack(facts, binary))
        except diskcache.Timeout:
            pass
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be written", error)

    def drop(self, facts: KeyFacts) -> None:
        if self._cache is None:
            return
        try:
            self._cache.delete(key_of(facts))
        except diskcache.Timeout:
            pass
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be written", error)

    def _warn(self, what: str, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"moe_xe's kernel cache {self.directory} {what} ({error}); kernels are compiled in every "
            f"process. If it is damaged, delete it; {DIRECTORY_VARIABLE} names another place.",
            RuntimeWarning,
            stacklevel=2,
        )


def default_disk_cache() -> DiskCache:
    """The user's cache, as the environment says. Raises ValueError for a size that is no number."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    size = os.environ.get(SIZE_VARIABLE, str(DEFAULT_SIZE))
    if not size.isdigit():
        raise ValueError(f"{SIZE_VARIABLE} is a number of bytes, not {size!r}")
    return DiskCache(
        Path(directory) if directory else Path(platformdirs.user_cache_dir("moe_xe", appauthor=False)) / "kernels",
        int(size),
    )
