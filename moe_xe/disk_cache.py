"""What was computed once, on disk, for this and all other processes: compiled kernels and tuning results.

A cache must never cost its user a result: every failure here is a warning, once, and the thing computed again.

Some entries are machine code, so whoever may write the folder may run code as its user: a folder that is not its owner's
alone is left unused. Each entry is a file under the hash of its facts: a checksum, the facts, the value. Files come into
place by one rename, and no reader waits for anybody.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from .private_folder import check_private, open_private

DIRECTORY_VARIABLE = "MOE_XE_CACHE_DIR"

# What an entry depends on, in values that JSON gives back as they are: str, int, float, bool, None, and lists and dicts of them.
Facts = dict[str, object]

_ENTRY = re.compile("[0-9a-f]{64}")
_UNFINISHED = re.compile("[0-9a-f]{64}[.][0-9a-f]{16}[.]tmp")
_STALE_S = 600      # a write takes milliseconds: what is unfinished for so long was left by a killed process
_LARGEST = 1 << 28  # bytes of an entry; a kernel has 10 to 100 kB
_DIGEST = hashlib.sha256().digest_size


class DamageWarning(RuntimeWarning):
    """An entry could not be trusted and was removed; its cache goes on."""


def _text_of(facts: Facts) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def key_of(facts: Facts) -> str:
    """The name under which the entry of these facts is kept."""
    return hashlib.sha256(_text_of(facts)).hexdigest()


def _pack(facts: bytes, value: bytes) -> bytes:
    contents = len(facts).to_bytes(8, "little") + facts + value
    return hashlib.sha256(contents).digest() + contents


def _unpack(entry: bytes) -> tuple[bytes, bytes]:
    """Text of the facts, and value. Raises ValueError unless the entry is whole."""
    if hashlib.sha256(memoryview(entry)[_DIGEST:]).digest() != entry[:_DIGEST]:
        raise ValueError("its checksum is wrong")
    start = _DIGEST + 8
    end = start + int.from_bytes(entry[_DIGEST:start], "little")
    return entry[start:end], entry[end:]


class DiskCache:
    """Facts -> bytes. Least recently used entries leave when the size limit (bytes) is reached.

    Nothing here raises for what the disk does, except `clear`.
    """

    def __init__(self, directory: Path, size_limit: int):
        self.directory = directory
        self.size_limit = size_limit
        self._room = 0      # bytes that may still be written before the folder's are counted again
        self._warned: set[type] = set()
        try:
            with self._folder(create=True):
                pass
        except OSError as error:
            self._warn_of_failure("cannot be opened", error)

    def load(self, facts: Facts) -> bytes | None:
        """The value stored for these facts; None where there is none that can be trusted."""
        text = _text_of(facts)
        with self._failing("cannot be read"), self._folder() as folder:
            key = hashlib.sha256(text).hexdigest()
            if (found := self._read(folder, key)) is not None:
                if found[0] == text:
                    with suppress(OSError):     # a disk that can only be read
                        _touch(folder, key)
                    return found[1]
                self._set_aside(folder, key, "it is of other facts")
        return None

    def store(self, facts: Facts, value: bytes) -> bool:
        """Whether the value is on disk now: as a whole, or not at all."""
        text = _text_of(facts)
        entry = _pack(text, value)
        if len(entry) > min(self.size_limit, _LARGEST):
            return False
        with self._failing("cannot be written"), self._folder(create=True) as folder:
            self._make_room(folder, len(entry))
            _write(folder, hashlib.sha256(text).hexdigest(), entry)
            return True
        return False

    def drop(self, facts: Facts, reason: str = "") -> None:
        """Removes the entry of these facts. reason: why it cannot be trusted, for a warning."""
        with self._failing("cannot be written"), self._folder() as folder:
            if reason:
                self._set_aside(folder, key_of(facts), reason)
            else:
                os.unlink(key_of(facts), dir_fd=folder)

    def entries(self) -> Iterator[tuple[Facts, bytes]]:
        """Facts and value of every entry; damaged ones are dropped."""
        with self._failing("cannot be read"), self._folder() as folder:
            for key in sorted(name for name, _ in _files(folder) if _ENTRY.fullmatch(name)):
                if (found := self._read(folder, key)) is None:
                    continue
                try:
                    facts = json.loads(found[0])
                    if not isinstance(facts, dict) or key_of(facts) != key:
                        raise ValueError("it is of other facts")
                except (ValueError, RecursionError) as error:
                    self._set_aside(folder, key, error)
                    continue
                yield facts, found[1]

    def volume(self) -> int:
        """Bytes of all files, unfinished ones too; 0 where they cannot be told."""
        with self._failing("cannot be read"), self._folder() as folder:
            return sum(status.st_size for _, status in _files(folder))
        return 0

    def clear(self) -> int:
        """Removes all entries, and what killed processes left, and says how many entries there were. Raises OSError where
        they cannot be removed."""
        count = 0
        try:
            with self._folder() as folder:
                for name, _ in _files(folder):
                    with suppress(FileNotFoundError):       # another process removed it
                        os.unlink(name, dir_fd=folder)
                        count += _ENTRY.fullmatch(name) is not None
        except FileNotFoundError:
            pass
        except OSError as error:
            raise OSError(f"moe_xe's cache {self.directory} cannot be cleared ({error})") from error
        return count

    @contextmanager
    def _folder(self, create: bool = False) -> Iterator[int]:
        """A descriptor; it is opened and checked anew for each use, so that none stays behind in threads and forks."""
        descriptor = open_private(self.directory, create)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Makes a failure a warning; what is not there, or was removed meanwhile, is none."""
        try:
            yield
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn_of_failure(what, error)

    def _read(self, folder: int, key: str) -> tuple[bytes, bytes] | None:
        """Text of the facts and value of a file; None without one that is whole."""
        try:
            return _unpack(_contents(folder, self.directory / key))
        except FileNotFoundError:
            pass
        except (ValueError, PermissionError) as error:
            self._set_aside(folder, key, error)
        except OSError as error:
            self._warn_of_failure("cannot be read", error)
        return None

    def _set_aside(self, folder: int, key: str, reason: object) -> None:
        with suppress(OSError):
            os.unlink(key, dir_fd=folder)
        self._warn(DamageWarning, f"moe_xe's cache {self.directory} has damaged entries ({key}: {reason}); they are removed and "
                                  "computed anew.")

    def _make_room(self, folder: int, needed: int) -> None:
        """Removes what killed processes left and, if the limit is reached, the least recently used eighth. Raises OSError."""
        self._room -= needed
        if self._room >= 0:
            return
        files = sorted(_files(folder), key=lambda file: file[1].st_mtime_ns)
        total = sum(status.st_size for _, status in files)
        most = self.size_limit if total + needed <= self.size_limit else self.size_limit * 7 // 8
        stale = time.time() - _STALE_S
        for name, status in files:
            if total + needed > most or (_UNFINISHED.fullmatch(name) and status.st_mtime < stale):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                total -= status.st_size
        # Other processes write too, so it is never the whole of a large room.
        self._room = min(self.size_limit - total - needed, self.size_limit // 16)

    def _warn_of_failure(self, what: str, error: OSError) -> None:
        self._warn(RuntimeWarning, f"moe_xe's cache {self.directory} {what} ({error}); every process computes anew what it would "
                                   f"keep. {DIRECTORY_VARIABLE} names another place.")

    def _warn(self, category: type[Warning], message: str) -> None:
        if category not in self._warned:
            self._warned.add(category)
            warnings.warn(message, category, stacklevel=2)


def _files(folder: int) -> list[tuple[str, os.stat_result]]:
    """The cache's files, finished or not; others that somebody put there are never touched."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _ENTRY.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(status.st_mode):
                        found.append((entry.name, status))
    return found


def _contents(folder: int, path: Path) -> bytes:
    """Raises ValueError for what is no file of ours, OSError."""
    descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        check_private(status, path)     # it may be of a time when others could write here
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise ValueError("it is no file of ours")
        return os.read(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _write(folder: int, key: str, entry: bytes) -> None:
    """Raises OSError, and leaves nothing then."""
    unfinished = f"{key}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(entry)
        _touch(folder, unfinished)
        os.replace(unfinished, key, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=folder)
        raise


def _touch(folder: int, name: str) -> None:
    """The file is used now, by a clock finer than the file system's own. Raises OSError."""
    now = time.time_ns()
    os.utime(name, ns=(now, now), dir_fd=folder, follow_symlinks=False)


def cache_directory() -> Path:
    """The folder of all caches, as the environment says; each has a folder of its own in it.

    Raises ValueError for a relative path without a current folder, or the ~ of a user who is not known.
    """
    if named := os.environ.get(DIRECTORY_VARIABLE):
        try:
            return Path(named).expanduser().absolute()
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{DIRECTORY_VARIABLE} is a folder, not {named!r}: {error}") from error
    default = Path(platformdirs.user_cache_dir("moe_xe", appauthor=False))
    # a user without a home folder
    return default if default.is_absolute() else Path(tempfile.gettempdir(), f"moe_xe-{os.geteuid()}")
