"""`file://`: local disks and shared POSIX file systems.

fsspec's local file system never fsyncs, shows half-written files and has no exclusive create that
is also whole, so this goes to the kernel: temporary file, fsync, link or rename, fsync of directories.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

from ray_ckpt.errors import UnsafeStoreError
from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import Listing, ObjectInfo, ObjectWriter
from ray_ckpt.types import PRIVATE_DIR

TEMPORARY = ".ray_ckpt-tmp-"
"""Start of a temporary file's name. No TensorFlow pattern (``model.ckpt*``, ``checkpoint``) matches it."""

LOCKS = f"{PRIVATE_DIR}/locks"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalBackend(Backend):
    """The files below one directory."""

    def __init__(self, root: str) -> None:
        self.root = root

    def put(self, path: str, data: memoryview) -> None:
        writer = self.create(path)
        with writer:
            writer.write(data)

    def create(self, path: str) -> ObjectWriter:
        return _FileWriter(self._prepared(path))

    def put_if_absent(self, path: str, data: bytes) -> None:
        target = self._prepared(path)
        writer = _FileWriter(target)
        try:
            writer.write(memoryview(data))
            writer.finish()
            _link(writer.temporary, target)
        finally:
            writer.abort()
        _sync_directory(os.path.dirname(target))

    def read(self, path: str) -> bytes:
        with open(self._full(path), "rb") as file:
            return file.read()

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, _digest(data)

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        with self._locked(path):
            if _digest(self.read(path)) != version:
                raise FileExistsError(errno.EEXIST, "changed since it was read", path)
            self.put(path, memoryview(data))

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        fd = os.open(self._full(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], start + done)
                if not count:
                    raise EOFError(path)
                done += count
        finally:
            os.close(fd)

    def size(self, path: str) -> int:
        return os.stat(self._full(path)).st_size

    def list(self, prefix: str) -> Listing:
        top = os.path.join(self.root, prefix) if prefix else self.root
        found = []
        for folder, folders, names in os.walk(top):
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            if relative == LOCKS:
                folders.clear()
                continue
            for name in names:
                with suppress(FileNotFoundError):  # deleted between the listing and the stat
                    if not name.startswith(TEMPORARY):
                        path = name if relative == "." else f"{relative}/{name}"
                        status = os.stat(os.path.join(folder, name))
                        found.append(ObjectInfo(path, status.st_size, status.st_mtime))
        return found

    def delete(self, path: str) -> None:
        full = self._full(path)
        os.unlink(full)
        _sync_directory(os.path.dirname(full))

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _prepared(self, path: str) -> str:
        full = self._full(path)
        _make_directories(os.path.dirname(full))
        return full

    @contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        """Hold the file's lock: `flock` excludes threads too, since each opens the lock file anew."""
        lock = self._prepared(f"{LOCKS}/{quote(path, safe='')}")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


class _FileWriter(ObjectWriter):
    """Writes a temporary file beside the target and renames it over the target."""

    def __init__(self, target: str) -> None:
        self.temporary = os.path.join(os.path.dirname(target), TEMPORARY + uuid.uuid4().hex)
        self._target = target
        self._fd: int | None = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: memoryview | bytes | bytearray) -> None:
        assert self._fd is not None
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Bring the bytes to the disk and close the file, which is still invisible."""
        assert self._fd is not None
        os.fsync(self._fd)
        self._close()

    def commit(self) -> None:
        self.finish()
        os.replace(self.temporary, self._target)
        _sync_directory(os.path.dirname(self._target))

    def abort(self) -> None:
        self._close()
        with suppress(FileNotFoundError):
            os.unlink(self.temporary)

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _link(source: str, target: str) -> None:
    """Give the file its name, unless the name is taken: exclusive on local disks and on NFS."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise UnsafeStoreError(
                f"the file system of {os.path.dirname(target)} has no hard links ({error.strerror}), so"
                " nothing can be created exclusively there: choose another directory"
            ) from error
        raise


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _make_directories(folder: str) -> None:
    """Make the folder and its parents; each new name is brought to the disk with its parent."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with suppress(FileExistsError):
            os.mkdir(path)
        _sync_directory(os.path.dirname(path))


def _sync_directory(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
