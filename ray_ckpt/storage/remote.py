"""What the fsspec backends share: reading, listing, deleting, and writing large objects in blocks."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import BytesLike, Listing, ObjectInfo, ObjectWriter
from ray_ckpt.storage.retry import TIMEOUT_S

BLOCK_NBYTES = 32 << 20
"""Size of one request when streaming: bounds the memory a writer or reader takes."""


class RemoteBackend(Backend):
    """Objects below ``root`` (bucket/folder) of an fsspec file system.

    The file system is made on first use and again after a fork: fsspec's event loop lives in a
    thread, which a forked process does not have.
    """

    attempts = 1000  # the deadline comes first

    def __init__(self, root: str, options: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> None:
        self.root = root
        self.options = dict(options)
        self.timeout_s = timeout_s
        self._made: tuple[int, Any] | None = None

    @abstractmethod
    def connect(self) -> Any:
        """A new file system object of fsspec."""

    @property
    def fs(self) -> Any:
        """This process's file system object."""
        made = self._made
        if made is None or made[0] != os.getpid():
            # Two threads may both get here: then one of two equal objects is dropped.
            made = self._made = (os.getpid(), self.connect())
        return made[1]

    def create(self, path: str) -> ObjectWriter:
        return StreamWriter(lambda: self.fs.open(self.full(path), "wb", block_size=BLOCK_NBYTES))

    def read(self, path: str) -> bytes:
        return bytes(self.fs.cat_file(self.full(path)))

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        for done in range(0, len(buffer), BLOCK_NBYTES):
            part = buffer[done : done + BLOCK_NBYTES]
            data = self._range(path, start + done, start + done + len(part))
            if len(data) != len(part):
                raise EOFError(path)
            part[:] = data

    def size(self, path: str) -> int:
        info = self.fs.info(self.full(path))
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def list(self, prefix: str) -> Listing:
        fs = self.fs
        root = self.root.lstrip("/")
        top = f"{root}/{prefix}" if prefix else root
        # Some file systems give their paths a leading slash, whatever they were asked with.
        found = ((name.lstrip("/"), info) for name, info in fs.find(self.root + top[len(root) :], detail=True).items())
        return [
            ObjectInfo(name[len(root) + 1 :], int(info["size"]), modified(info))
            for name, info in found
            if name.startswith(f"{top}/") and info["type"] == "file" and not name.endswith("/")
        ]

    def delete(self, path: str) -> None:
        self.fs.rm_file(self.full(path))

    def full(self, path: str) -> str:
        """The path as fsspec wants it."""
        return f"{self.root}/{path}"

    def _range(self, path: str, start: int, stop: int) -> bytes:
        try:
            return bytes(self.fs.cat_file(self.full(path), start=start, end=stop))
        except Exception as error:
            # A range that begins behind the end is an error of the service, each with a text of its own.
            if any(text in str(error) for text in ("not satisfiable", "InvalidRange", "416")):
                raise EOFError(path) from error
            raise


def modified(info: Mapping[str, Any]) -> float:
    """The time of last change in an fsspec listing, in seconds since the epoch; 0 where it has none."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


class StreamWriter(ObjectWriter):
    """Writes through an fsspec file, which uploads in blocks and shows the object when it is closed."""

    def __init__(self, open_file: Callable[[], Any]) -> None:
        self._file = open_file()

    def write(self, data: BytesLike) -> None:
        for start in range(0, len(data), BLOCK_NBYTES):
            self._file.write(data[start : start + BLOCK_NBYTES])

    def commit(self) -> None:
        self._file.close()

    def abort(self) -> None:
        # Marked closed first: otherwise collecting the file object would finish the upload.
        self._file.closed = True
        self._file.discard()
