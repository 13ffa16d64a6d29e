"""What was computed once, on disk, for this and all other processes: compiled kernels and tuning results.

A cache must never cost its user a result: every failure here is a warning, once, and the thing computed again.

Some entries are machine code, so whoever may write the folder may run code as its user; it is created for its owner alone.
"""
from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import diskcache
import platformdirs

DIRECTORY_VARIABLE = "MOE_XE_CACHE_DIR"

# What an entry depends on, in values that JSON gives back as they are: str, int, float, bool, None, and lists and dicts of them.
Facts = dict[str, object]

_TIMEOUT_S = 5.0
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout)


class _RawDisk(diskcache.Disk):
    """diskcache unpickles what it finds; our keys are text, our values plain bytes, and nothing else is read."""

    def get(self, key, raw):
        return key if raw else None

    def fetch(self, mode, filename, value, read):
        if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
            raise ValueError("not an entry of moe_xe")
        return super().fetch(mode, filename, value, read)


def key_of(facts: Facts) -> str:
    """The name under which the entry of these facts is kept."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pack(facts: Facts, value: bytes) -> bytes:
    header = {"facts": facts, "sha256": hashlib.sha256(value).hexdigest()}
    return json.dumps(header).encode() + b"\n" + value


def _unpack(key: str, entry: bytes) -> tuple[Facts, bytes]:
    """Raises ValueError, TypeError or AttributeError unless the entry is whole and was stored under this key."""
    header_line, _, value = entry.partition(b"\n")
    header = json.loads(header_line)
    if header.keys() != {"facts", "sha256"} or header["sha256"] != hashlib.sha256(value).hexdigest():
        raise ValueError("damaged")
    if key_of(header["facts"]) != key:
        raise ValueError("of other facts")
    return header["facts"], value


class DiskCache:
    """Facts -> bytes. Least recently used entries leave when the size limit (bytes) is reached.

    Nothing here raises for what the disk does, except `clear`.
    """

    def __init__(self, directory: Path, size_limit: int):
        self.directory = directory
        self._cache = None
        self._warned = False
        try:
            for folder in (directory.parent, directory):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._cache = diskcache.Cache(
                str(directory),
                disk=_RawDisk,
                timeout=_TIMEOUT_S,
                size_limit=size_limit,
                eviction_policy="least-recently-used",
                cull_limit=2,  # as many leave at once; the default of 10 could be all of them
            )
        except _FAILURES as error:
            self._warn("cannot be opened", error)

    def load(self, facts: Facts) -> bytes | None:
        """The value stored for these facts; None where there is none that can be trusted."""
        found = self._read(key_of(facts))
        return None if found is None else found[1]

    def store(self, facts: Facts, value: bytes) -> bool:
        """Whether the value is on disk now: as a whole, or not at all."""
        if self._cache is None:
            return False
        try:
            return self._cache.set(key_of(facts), _pack(facts, value))
        except diskcache.Timeout:
            return False  # other processes are busy with the database
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be written", error)
            return False

    def drop(self, facts: Facts) -> None:
        self._delete(key_of(facts))

    def entries(self) -> Iterator[tuple[Facts, bytes]]:
        """Facts and value of every entry; damaged ones are dropped."""
        for key in self._keys():
            if (found := self._read(key)) is not None:
                yield found

    def volume(self) -> int:
        """Bytes on disk, about; 0 where they cannot be told."""
        try:
            return 0 if self._cache is None else self._cache.volume()
        except _FAILURES as error:
            self._warn("cannot be read", error)
            return 0

    def clear(self) -> int:
        """Removes all entries and says how many there were. Raises OSError where they cannot be removed."""
        try:
            return 0 if self._cache is None else self._cache.clear()
        except _FAILURES as error:
            why = "other processes use it" if isinstance(error, diskcache.Timeout) else error
            raise OSError(f"moe_xe's cache {self.directory} cannot be cleared ({why})") from error

    def _keys(self) -> list[str]:
        try:
            return [] if self._cache is None else [key for key in self._cache if isinstance(key, str)]
        except _FAILURES as error:
            self._warn("cannot be read", error)
            return []

    def _read(self, key: str) -> tuple[Facts, bytes] | None:
        if self._cache is None:
            return None
        try:
            entry = self._cache.get(key)
            return None if entry is None else _unpack(key, entry)
        except diskcache.Timeout:
            return None
        except (ValueError, TypeError, AttributeError):
            self._delete(key)
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be read", error)
        return None

    def _delete(self, key: str) -> None:
        if self._cache is None:
            return
        try:
            self._cache.delete(key)
        except diskcache.Timeout:
            pass
        except (OSError, sqlite3.Error) as error:
            self._warn("cannot be written", error)

    def _warn(self, what: str, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"moe_xe's cache {self.directory} {what} ({error}); every process computes anew what it would keep. If it is "
            f"damaged, delete it; {DIRECTORY_VARIABLE} names another place.",
            RuntimeWarning,
            stacklevel=2,
        )


def cache_directory() -> Path:
    """The folder of all caches, as the environment says; each has a folder of its own in it."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return Path(directory) if directory else Path(platformdirs.user_cache_dir("moe_xe", appauthor=False))
