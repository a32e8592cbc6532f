"""Room for segments, and what to do where there is none."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NoReturn

from ray_ckpt.errors import StorageError


def check_free(path: Path, nbytes: int) -> None:
    """Raise `StorageError` unless the folder of this file has room for so many bytes."""
    try:
        found = os.statvfs(path.parent)
    except OSError as err:
        raise StorageError(f"{path.parent}: cannot hold segments: {err.strerror}") from err
    free = found.f_bavail * found.f_frsize
    if free < nbytes:
        raise StorageError(f"{path}: needs {nbytes} bytes, its folder has {free} free; {_REMEDY}")


_REMEDY = (
    "give it more (docker run --shm-size, an emptyDir with medium Memory, mount -o remount,size=), remove old "
    "segments with `ray-ckpt clean`, or name another folder"
)


def has_room(folder: Path, nbytes: int) -> bool:
    """Whether a folder can take so many bytes more and leaves others something, who may be the training processes."""
    usage = shutil.disk_usage(folder)
    return usage.free - nbytes > _RESERVE * usage.total


_RESERVE = 0.05
"""Of all that a tmpfs can hold."""


def raise_full(path: Path, nbytes: int, err: OSError) -> NoReturn:
    """The `StorageError` for a write that failed, most probably for want of memory."""
    if err.errno == errno.ENOSPC:
        raise StorageError(f"{path}: no space for {nbytes} bytes in {path.parent}; {_REMEDY}") from err
    raise StorageError(f"{path}: cannot write the segment: {err.strerror}") from err


def new_file(path: Path) -> tuple[int, bool]:
    """A new file that is to lie at this path, open for writing, and whether it has that name already.

    Without one, where the file system can: it goes with its process until `give_name`. Raises `OSError`.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path.parent, flags | os.O_TMPFILE, 0o600), False
    except OSError:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), True


def give_name(fd: int, path: Path) -> None:
    """Have a file without a name appear at this path. Raises `StorageError` if something lies there."""
    # Any directory: os.link follows the symbolic link in /proc only if it is given one.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=folder)
    except OSError as err:
        raise StorageError(f"{path}: cannot create the segment: {err.strerror}") from err
    finally:
        os.close(folder)
