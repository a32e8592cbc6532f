"""`memory://`: objects in this process, for tests and notebooks. Other processes see none of them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import BytesLike, Listing, ObjectInfo, ObjectWriter


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    version: int
    modified: float = field(default_factory=time.time)


_lock = threading.Lock()
_objects: dict[str, _Object] = {}
_last_version = 0


class MemoryBackend(Backend):
    """The objects below one directory of this process's memory."""

    def __init__(self, root: str) -> None:
        self._root = f"{root}/"

    def put(self, path: str, data: memoryview) -> None:
        with _lock:
            self._set(path, bytes(data))

    def create(self, path: str) -> ObjectWriter:
        return _MemoryWriter(self, path)

    def put_if_absent(self, path: str, data: bytes) -> None:
        with _lock:
            if self._root + path in _objects:
                raise FileExistsError(path)
            self._set(path, data)

    def read(self, path: str) -> bytes:
        return self._get(path).data

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        held = self._get(path)
        return held.data, str(held.version)

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        with _lock:
            if str(self._get(path).version) != version:
                raise FileExistsError(path)
            self._set(path, data)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        data = memoryview(self._get(path).data)[start : start + len(buffer)]
        if len(data) < len(buffer):
            raise EOFError(path)
        buffer[:] = data

    def size(self, path: str) -> int:
        return len(self._get(path).data)

    def list(self, prefix: str) -> Listing:
        start = self._root + (f"{prefix}/" if prefix else "")
        with _lock:
            return [
                ObjectInfo(full[len(self._root) :], len(held.data), held.modified)
                for full, held in _objects.items()
                if full.startswith(start)
            ]

    def delete(self, path: str) -> None:
        with _lock:
            _objects.pop(self._root + path, None)

    def _get(self, path: str) -> _Object:
        try:
            return _objects[self._root + path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def _set(self, path: str, data: bytes) -> None:
        """Store the object under the next version; the caller holds the lock."""
        global _last_version
        _last_version += 1
        _objects[self._root + path] = _Object(data, _last_version)


class _MemoryWriter(ObjectWriter):
    def __init__(self, backend: MemoryBackend, path: str) -> None:
        self._backend = backend
        self._path = path
        self._data = bytearray()

    def write(self, data: BytesLike) -> None:
        self._data += data

    def commit(self) -> None:
        self._backend.put(self._path, memoryview(self._data))

    def abort(self) -> None:
        self._data.clear()
