"""`file://`: local disks and shared POSIX file systems.

fsspec's local file system never fsyncs, shows half-written files and has no exclusive create that
is also whole, so this goes to the kernel: temporary file, fsync, link or rename, fsync of directories.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

from ray_ckpt.errors import UnsafeStoreError
from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import Listing, ObjectInfo, ObjectWriter
from ray_ckpt.storage.direct import ALIGNMENT, WORTHWHILE_NBYTES, fits, turn_off, turn_on
from ray_ckpt.types import PRIVATE_DIR

TEMPORARY = ".ray_ckpt-tmp-"
"""Start of a temporary file's name. No TensorFlow pattern (``model.ckpt*``, ``checkpoint``) matches it."""

LOCKS = f"{PRIVATE_DIR}/locks"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalBackend(Backend):
    """The files below one directory.

    Links are followed where files are read, as data may have been put on another disk: what the kernel lets this user
    read, the user may restore. Nothing is written or removed through a link that stands for a file: a new file takes
    the link's place, and only the link is removed. Listings do not go into linked folders.
    """

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
            writer.commit_if_absent()
        finally:
            writer.abort()

    def read(self, path: str) -> bytes:
        with open(_open_file(self._full(path)), "rb") as file:
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
        fd = _open_file(self._full(path))
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
                status = None if name.startswith(TEMPORARY) else _status(os.path.join(folder, name))
                if status is not None:
                    path = name if relative == "." else f"{relative}/{name}"
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
    """Writes a file without a name, which the kernel reclaims if this process dies, and names it at the end.

    Where the file system knows no such files (`open(2)`, O_TMPFILE), it has a temporary name instead. The pages of
    a large file go to the disk past the page cache, up to the first piece that does not consist of whole pages.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._folder = os.path.dirname(target)
        self._temporary: str | None = None
        self._fd: int | None = self._open()
        self._direct: bool | None = None  # decided by the first bytes

    def _open(self) -> int:
        with suppress(OSError):
            fd = os.open(self._folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            if os.path.exists(f"/proc/self/fd/{fd}"):
                return fd
            os.close(fd)
        self._temporary = self._new_name()
        return os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _new_name(self) -> str:
        return os.path.join(self._folder, TEMPORARY + uuid.uuid4().hex)

    def write(self, data: memoryview | bytes | bytearray) -> None:
        assert self._fd is not None
        view = memoryview(data)
        if self._direct is None:
            self._direct = len(view) >= WORTHWHILE_NBYTES and fits(view) and turn_on(self._fd)
        while view:
            if self._direct and not fits(view):
                self._go_through_cache()
            view = view[self._write_some(view) :]

    def _write_some(self, view: memoryview) -> int:
        assert self._fd is not None
        if self._direct:
            try:
                return os.write(self._fd, view[: len(view) // ALIGNMENT * ALIGNMENT])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._go_through_cache()  # this disk wants more than we know of
        return os.write(self._fd, view)

    def _go_through_cache(self) -> None:
        assert self._fd is not None
        turn_off(self._fd)
        self._direct = False

    def commit(self) -> None:
        self._sync()
        if self._temporary is None:
            self._temporary = self._new_name()
            self._link(self._temporary)
        os.replace(self._temporary, self._target)
        self._close()
        _sync_directory(self._folder)

    def commit_if_absent(self) -> None:
        """As `commit`, but raise FileExistsError where the target is there already."""
        self._sync()
        self._link(self._target)
        self.abort()
        _sync_directory(self._folder)

    def abort(self) -> None:
        self._close()
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def _sync(self) -> None:
        assert self._fd is not None
        os.fsync(self._fd)

    def _link(self, target: str) -> None:
        """Give the file this name, unless it is taken."""
        if self._temporary is not None and target != self._temporary:
            _link(self._temporary, target)
            return
        # Any directory: os.link follows the symbolic link in /proc only if it is given one.
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _link(f"/proc/self/fd/{self._fd}", target, folder)
        finally:
            os.close(folder)

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _link(source: str, target: str, folder: int | None = None) -> None:
    """Give the file its name, unless the name is taken: exclusive on local disks and on NFS."""
    try:
        os.link(source, target, src_dir_fd=folder)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        directory = os.path.dirname(target)
        if error.errno == errno.EPERM and not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(
                errno.EACCES, "no permission to write, or the directory is immutable", directory
            ) from error
        # The kernel says EPERM for an append-only directory as well.
        also = " or forbids them here (lsattr tells)" if error.errno == errno.EPERM else ""
        raise UnsafeStoreError(
            f"the file system of {directory} has no hard links{also} ({error.strerror}), so nothing can be created"
            " exclusively there: choose another directory"
        ) from error


def _open_file(path: str) -> int:
    """A file for reading. Others than files are refused: a pipe may never have an end, nor a device."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", path)


def _status(path: str) -> os.stat_result | None:
    """Of a file, also at the end of a link; None if it is none, or has been deleted since it was listed."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None


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
