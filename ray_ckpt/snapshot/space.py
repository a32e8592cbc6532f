"""Room for segments, and what to do where there is none."""

from __future__ import annotations

import errno
import os
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


def raise_full(path: Path, nbytes: int, err: OSError) -> NoReturn:
    """The `StorageError` for a write that failed, most probably for want of memory."""
    if err.errno == errno.ENOSPC:
        raise StorageError(f"{path}: no space for {nbytes} bytes in {path.parent}; {_REMEDY}") from err
    raise StorageError(f"{path}: cannot write the segment: {err.strerror}") from err
