"""Folders of the user's own: what is read from them may be run, so nobody else may have written there."""
from __future__ import annotations

import os
import stat
from pathlib import Path


def open_private(folder: Path, create: bool) -> int:
    """A descriptor of the folder, which the caller closes. create: makes it, and all above it, for its owner alone.

    Raises PermissionError, saying why, if the folder or the one above it is a symbolic link, or others can write to it; another
    OSError where it cannot be opened.
    """
    if create:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
    parent = _open(folder.parent, os.O_PATH)
    try:
        # What lies in a sticky folder (/tmp) can be replaced by its owner only, and system folders are root's.
        status = os.fstat(parent)
        if not status.st_mode & stat.S_ISVTX or status.st_uid not in (0, os.geteuid()):
            check_private(status, folder.parent, also=0)
        descriptor = _open(folder, os.O_RDONLY, parent)
    finally:
        os.close(parent)
    try:
        check_private(os.fstat(descriptor), folder)
    except PermissionError:
        os.close(descriptor)
        raise
    return descriptor


def check_private(status: os.stat_result, path: Path, also: int | None = None) -> None:
    """Raises PermissionError if somebody else than this process' user (or `also`) can write what has this status."""
    if status.st_uid not in (os.geteuid(), also):
        raise PermissionError(f"{path} is another user's, of id {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others than its owner, its mode is {stat.S_IMODE(status.st_mode):o}")


def _open(folder: Path, flags: int, parent: int | None = None) -> int:
    flags |= os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(folder if parent is None else folder.name, flags, dir_fd=parent)
    except OSError:
        if folder.is_symlink():
            raise PermissionError(f"{folder} is a symbolic link") from None
        raise
