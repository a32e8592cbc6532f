"""Writing past the page cache (`open(2)`, O_DIRECT): the disk reads the bytes where they lie.

It spares a copy, which costs the training on the same host cores and memory bandwidth, and a page of memory for each
page written, which would push out the input pipeline's. Only on local disks: network file systems would make each
write wait for the server.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from contextlib import suppress

import numpy as np

ALIGNMENT = 4096
"""Bytes: a multiple of every disk's block and of every device's alignment in memory."""

WORTHWHILE_NBYTES = 1 << 20
"""A file that begins with a smaller piece is small."""

_LOCAL_DISKS = {0xEF53, 0x58465342}
"""`statfs(2)` f_type of ext4 (and 2, 3) and of XFS."""


def fits(data: memoryview) -> bool:
    """Whether these bytes begin with enough whole pages, in place, that the page cache can be passed by."""
    if len(data) < ALIGNMENT:
        return False
    return np.frombuffer(data, np.uint8).ctypes.data % ALIGNMENT == 0


def turn_on(fd: int) -> bool:
    """Pass the page cache by from here on, where the file lies on a local disk that allows it."""
    if _file_system(fd) not in _LOCAL_DISKS:
        return False
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        return True
    return False


def turn_off(fd: int) -> None:
    """Write through the page cache from here on."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _file_system(fd: int) -> int:
    """`fstatfs(2)`'s f_type, the first word of its result, which the standard library does not tell."""
    result = (ctypes.c_long * 32)()
    return result[0] if ctypes.CDLL(None).fstatfs(fd, ctypes.byref(result)) == 0 else 0
