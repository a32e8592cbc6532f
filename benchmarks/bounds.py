"""The bounds that a machine sets: copy, write with fsync, checksum and read of the same number of bytes."""

from __future__ import annotations

import ctypes
import os
import time

import crc32c
import numpy as np

_BLOCK = 8 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)


class Bounds:
    """Buffers of one rank's bytes, touched before anything is timed, and what is timed with them."""

    def __init__(self, nbytes: int, path: str) -> None:
        self._path = path
        count = -(-nbytes // 4)
        self._source = np.random.default_rng(0).random(count, dtype=np.float32)
        self._copy = np.ones(count, np.float32)

    def memcpy(self) -> float:
        """Seconds of one thread's copy into memory that is warm."""
        began = time.perf_counter()
        ctypes.memmove(self._copy.ctypes.data, self._source.ctypes.data, self._source.nbytes)
        return time.perf_counter() - began

    def crc(self) -> float:
        """Seconds of one thread's crc32c."""
        began = time.perf_counter()
        crc32c.crc32c(memoryview(self._source).cast("B"))
        return time.perf_counter() - began

    def write(self) -> tuple[float, float]:
        """When a sequential write of a new file began and its fsync returned (monotonic); the file is gone then.

        The second of two: where a hypervisor takes free memory back, the first pays for the page cache's new pages,
        up to several times the write itself. Those pages are free again for the save that follows.
        """
        self._write_file()
        return self._write_file()

    def _write_file(self) -> tuple[float, float]:
        view = memoryview(self._source).cast("B")
        began = time.monotonic()
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for start in range(0, len(view), _BLOCK):
                _write_all(handle, view[start : start + _BLOCK])
            os.fsync(handle)
            return began, time.monotonic()
        finally:
            os.close(handle)
            os.unlink(self._path)


def read(path: str) -> float:
    """Seconds of a sequential read of the file into one new buffer that was not touched before."""
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        view = memoryview(np.empty(os.fstat(file.fileno()).st_size, np.uint8))
        done = 0
        while count := file.readinto(view[done : done + _BLOCK]):
            done += count
    return time.perf_counter() - began


def sync_file_system(path: str) -> None:
    """Wait until everything written to the file system of ``path`` is on the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if _LIBC.syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), f"syncfs of {path} failed")
    finally:
        os.close(handle)


def evict(paths: list[str]) -> None:
    """Drop clean pages of these files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _write_all(handle: int, view: memoryview) -> None:
    while view:
        view = view[os.write(handle, view) :]
