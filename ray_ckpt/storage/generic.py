"""Any other fsspec file system, for runs that promise to have one coordinator only.

Nothing here is exclusive: creation looks first and then writes, so two coordinators could both win.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import fsspec

from ray_ckpt.storage.base import BytesLike, ObjectWriter
from ray_ckpt.storage.remote import RemoteBackend
from ray_ckpt.storage.retry import TIMEOUT_S


class GenericBackend(RemoteBackend):
    """Objects below a folder of an fsspec file system of whatever kind."""

    exclusive = False
    attempts = 6  # what is below may try again on its own

    def __init__(self, url: str, options: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> None:
        super().__init__("", options, timeout_s)
        self._url = url

    def connect(self) -> Any:
        # Only the file system knows which part of its URL names a host or an account.
        options = {**self.options, "use_listings_cache": False, "skip_instance_cache": True}
        fs, root = fsspec.core.url_to_fs(self._url, **options)
        self.root = root.rstrip("/")
        return fs

    def full(self, path: str) -> str:
        sep = self.fs.sep  # connects, which finds the root
        return f"{self.root}{sep}{path}"

    def create(self, path: str) -> ObjectWriter:
        self._make_parent(path)
        return _VisibleWriter(self.fs, self.full(path))

    def put(self, path: str, data: memoryview) -> None:
        self._make_parent(path)
        self.fs.pipe_file(self.full(path), bytes(data))

    def put_if_absent(self, path: str, data: bytes) -> None:
        if self.fs.exists(self.full(path)):
            raise FileExistsError(path)
        self.put(path, memoryview(data))

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        if self.read_versioned(path)[1] != version:
            raise FileExistsError(path)
        self.put(path, memoryview(data))

    def _make_parent(self, path: str) -> None:
        self.fs.makedirs(self.fs._parent(self.full(path)), exist_ok=True)


class _VisibleWriter(ObjectWriter):
    """Writes an fsspec file that others may see half-written: `abort` removes it again."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        self._path = path
        self._file = fs.open(path, "wb")

    def write(self, data: BytesLike) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.close()

    def abort(self) -> None:
        self._file.close()
        if self._fs.exists(self._path):
            self._fs.rm_file(self._path)
