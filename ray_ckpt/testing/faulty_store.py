"""`FaultyStore`: a store with planned faults, injected below the retries, where real ones happen.

One lost reply is therefore absorbed as in production; a fault that strikes on all attempts, or whose
error is not a transient one, reaches the caller as a `StorageError`.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import BytesLike, Listing, ObjectWriter, Store
from ray_ckpt.storage.store import BackedStore

T = TypeVar("T")
Kind = Literal["before", "after", "truncate", "call", "crash_before", "crash_after"]


class Crash(BaseException):
    """The process dies here. Not an `Exception`, so that no handler goes on."""


def lost_connection() -> Exception:
    """The default error: a transient one."""
    return ConnectionResetError("injected fault")


def nothing() -> None:
    """The default hook."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when.

    ``operation`` is a method of `Backend`, or "write" and "commit" of a streaming writer, or "*";
    ``path`` a pattern (for "list": its prefix). The fault strikes at matching calls number ``first`` to
    ``first + times - 1``, counted from 1 over all attempts. Kinds:

    before: raises ``error()``, nothing was done; after: it was done, but the reply is lost;
    truncate: only the first half arrives, or is given, without an error; call: runs ``hook`` (slow, or
    somebody else acts meanwhile) and goes on; crash_before, crash_after: raises `Crash`.
    """

    operation: str
    kind: Kind
    path: str = "*"
    first: int = 1
    times: int = 1
    error: Callable[[], Exception] = lost_connection
    hook: Callable[[], None] = nothing

    def matches(self, operation: str, path: str) -> bool:
        """Whether this call counts for the fault."""
        return self.operation in ("*", operation) and fnmatch.fnmatchcase(path, self.path)


ALWAYS = 1 << 62
"""For `Fault.times`: from the first one on."""


class FaultyStore(BackedStore):
    """Another store's directory, seen through faults. ``calls`` lists (operation, path) as they came."""

    def __init__(self, inner: Store, plan: Sequence[Fault] = ()) -> None:
        if not isinstance(inner, BackedStore):
            raise TypeError(f"faults need a store made by open_store, found {type(inner).__name__}")
        self.faults = FaultyBackend(inner.backend, plan)
        # Waiting between attempts adds nothing to a test.
        super().__init__(
            inner.url,
            self.faults,
            inner.options,
            inner.rebuild,
            timeout_s=inner.timeout_s,
            sleep=lambda _: None,
        )

    @property
    def calls(self) -> list[tuple[str, str]]:
        """Every call that reached the storage, in order."""
        return self.faults.calls


class FaultyBackend(Backend):
    """Passes everything on to another backend, but for the planned faults."""

    def __init__(self, inner: Backend, plan: Sequence[Fault]) -> None:
        self.exclusive = inner.exclusive
        self.attempts = inner.attempts
        self.calls: list[tuple[str, str]] = []
        self._inner = inner
        self._plan = plan
        self._counts = [0] * len(plan)
        self._lock = threading.Lock()

    def run(self, operation: str, path: str, full: Callable[[], T], half: Callable[[], T]) -> T:
        """One call with the faults due for it; ``half`` is its truncated form."""
        due = self._due(operation, path)
        call = full
        for fault in due:
            if fault.kind == "before":
                raise fault.error()
            if fault.kind == "crash_before":
                raise Crash(f"{operation} {path}")
            if fault.kind == "call":
                fault.hook()
            if fault.kind == "truncate":
                call = half
        result = call()
        for fault in due:
            if fault.kind == "after":
                raise fault.error()
            if fault.kind == "crash_after":
                raise Crash(f"{operation} {path}")
        return result

    def _due(self, operation: str, path: str) -> list[Fault]:
        with self._lock:
            self.calls.append((operation, path))
            due = []
            for number, fault in enumerate(self._plan):
                if fault.matches(operation, path):
                    self._counts[number] += 1
                    if fault.first <= self._counts[number] < fault.first + fault.times:
                        due.append(fault)
            return due

    def put(self, path: str, data: memoryview) -> None:
        half = data[: len(data) // 2]
        self.run("put", path, lambda: self._inner.put(path, data), lambda: self._inner.put(path, half))

    def create(self, path: str) -> ObjectWriter:
        def create() -> ObjectWriter:
            return _FaultyWriter(self, self._inner.create(path), path)

        return self.run("create", path, create, create)

    def put_if_absent(self, path: str, data: bytes) -> None:
        def put(part: bytes) -> None:
            self._inner.put_if_absent(path, part)

        self.run("put_if_absent", path, lambda: put(data), lambda: put(data[: len(data) // 2]))

    def read(self, path: str) -> bytes:
        def half() -> bytes:
            data = self._inner.read(path)
            return data[: len(data) // 2]

        return self.run("read", path, lambda: self._inner.read(path), half)

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        def half() -> tuple[bytes, str]:
            data, version = self._inner.read_versioned(path)
            return data[: len(data) // 2], version

        return self.run("read_versioned", path, lambda: self._inner.read_versioned(path), half)

    def replace_if(self, path: str, data: bytes, version: str) -> None:
        def replace(part: bytes) -> None:
            self._inner.replace_if(path, part, version)

        self.run("replace_if", path, lambda: replace(data), lambda: replace(data[: len(data) // 2]))

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        def half() -> None:
            self._inner.read_into(path, start, buffer[: len(buffer) // 2])
            raise EOFError(path)

        self.run("read_into", path, lambda: self._inner.read_into(path, start, buffer), half)

    def size(self, path: str) -> int:
        return self.run("size", path, lambda: self._inner.size(path), lambda: self._inner.size(path) // 2)

    def list(self, prefix: str) -> Listing:
        def half() -> Listing:
            found = sorted(self._inner.list(prefix), key=lambda info: info.path)
            return found[: len(found) // 2]

        return self.run("list", prefix, lambda: self._inner.list(prefix), half)

    def delete(self, path: str) -> None:
        def delete() -> None:
            self._inner.delete(path)

        self.run("delete", path, delete, delete)


class _FaultyWriter(ObjectWriter):
    def __init__(self, backend: FaultyBackend, inner: ObjectWriter, path: str) -> None:
        self._backend = backend
        self._inner = inner
        self._path = path

    def write(self, data: BytesLike) -> None:
        half = data[: len(data) // 2]
        self._backend.run("write", self._path, lambda: self._inner.write(data), lambda: self._inner.write(half))

    def commit(self) -> None:
        self._backend.run("commit", self._path, self._inner.commit, self._inner.commit)

    def abort(self) -> None:
        self._inner.abort()
