"""The narrow Store: everything that this package asks of a place where checkpoints live.

A Store is one directory. Paths are relative to it, with "/" between the parts. All methods block
and may be called from any thread; a Store can be pickled and is rebuilt in the other process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from ray_ckpt.errors import UsageError

BytesLike: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing; ``modified`` in seconds since the epoch, by the store's clock."""

    path: str
    nbytes: int
    modified: float


Listing: TypeAlias = list[ObjectInfo]


class ObjectWriter(ABC):
    """A new object, written from front to back; nobody sees any of it before `commit`.

    As a context manager it aborts on an exception and otherwise commits, unless that was done.
    """

    @abstractmethod
    def write(self, data: BytesLike) -> None:
        """Append these bytes (any contiguous buffer)."""

    @abstractmethod
    def commit(self) -> None:
        """Make the object durable and visible under its path, replacing an older one."""

    @abstractmethod
    def abort(self) -> None:
        """Forget what was written; nothing becomes visible. Does nothing after `commit`."""

    def __enter__(self) -> ObjectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


class Reader(ABC):
    """Objects that can be read, by paths; ``url`` names the place in messages."""

    url: str

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object. Raises `ObjectMissingError`."""

    @abstractmethod
    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from ``start`` on.

        Raises `ObjectMissingError`, and `DamagedError` where the object ends before.
        """

    def lend(self, path: str, start: int, nbytes: int) -> memoryview | None:  # noqa: ARG002
        """These bytes as writeable memory of the caller's own, where that can be had without a copy; None: read them.

        To read the same bytes into it is then only to check that they are there.
        """
        return None

    def read_range(self, path: str, start: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes from ``start`` on. Raises as `read_into` does."""
        buffer = bytearray(nbytes)
        self.read_into(path, start, memoryview(buffer))
        return bytes(buffer)

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes in the object. Raises `ObjectMissingError`."""


class Store(Reader):
    """One directory on a file system or an object store.

    ``url`` is canonical: no trailing slash, no credentials, equal for equal places. ``exclusive`` says
    whether `put_if_absent` and `replace_if` hold against any number of processes.

    Every method comes back, or raises, within ``timeout_s`` and a second for each megabyte that it moves; a conditional
    write that got no answer takes as long again to read back what became of it. A call that hangs in the kernel or in
    a library cannot be ended: it is left to itself, and may still do its work, or fill its buffer, after the error.

    Every method raises `StorageError` with URL, operation and remedy after its retries are spent, and
    `UsageError` for a path that is not a plain relative one.
    """

    exclusive: bool
    timeout_s: float

    @abstractmethod
    def put(self, path: str, data: BytesLike) -> None:
        """Write a whole object: atomic to readers, durable on return."""

    @abstractmethod
    def create(self, path: str) -> ObjectWriter:
        """Write an object piece by piece. Not retried as a whole: after an error, write another path."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create the object. True: it is there because of this call; False: another made it.

        ``data`` must be unique to the caller: after a lost reply it is read back and compared.
        """

    @abstractmethod
    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        """The whole object with the version that `replace_if` takes; None if it is not there."""

    @abstractmethod
    def replace_if(self, path: str, data: bytes, version: str | None) -> bool:
        """Compare and swap: write only if the object still has this version (None: is not there).

        True too where the object already holds exactly ``data``: after a lost reply it is read back. A
        version may name the content, so an object that went back to the same bytes counts as unchanged.
        """

    @abstractmethod
    def list(self, prefix: str) -> Listing:
        """Every object below this directory ("": all), at any depth, sorted by path; [] if none."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; nothing happens if it is not there."""

    @abstractmethod
    def check(self) -> None:
        """Prove early that the directory can be written, and that exclusive creation is exclusive.

        Raises `StorageError` (not a directory, not permitted, read-only, full, no such bucket) or
        `UnsafeStoreError`.
        """


def checked_path(path: str) -> str:
    """The path itself. Raises `UsageError` unless it is relative and stays in its directory."""
    parts = path.split("/")
    if "\0" in path or "://" in path or any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"{path!r} is not a path inside a checkpoint directory: expected parts joined by '/',"
            " none of them empty, '.' or '..'"
        )
    return path


def flat(data: BytesLike) -> memoryview:
    """The buffer as plain bytes, without a copy. Empty ones need care: `memoryview.cast` refuses zeros."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")
