"""`BackedStore`: a `Store` made of a `Backend` by adding path checks, retries, read-back and our errors."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

from ray_ckpt.errors import DamagedError, ObjectMissingError, StorageError, UnsafeStoreError
from ray_ckpt.storage.backend import Backend
from ray_ckpt.storage.base import BytesLike, Listing, ObjectWriter, Store, checked_path, flat
from ray_ckpt.storage.retry import TIMEOUT_S, GaveUpError, deadline_s, retrying, within
from ray_ckpt.storage.translate import translated
from ray_ckpt.types import PRIVATE_DIR

T = TypeVar("T")
logger = logging.getLogger(__name__)


class BackedStore(Store):
    """A store over bare operations. ``rebuild`` makes an equal one in another process (for pickle)."""

    def __init__(
        self,
        url: str,
        backend: Backend,
        options: Mapping[str, Any],
        rebuild: tuple[Callable[..., Store], tuple[Any, ...]],
        *,
        timeout_s: float = TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url
        self.exclusive = backend.exclusive
        self.backend = backend
        self.options = dict(options)
        self.rebuild = rebuild
        self.timeout_s = timeout_s
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"<Store {self.url}>"

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        return self.rebuild

    def put(self, path: str, data: BytesLike) -> None:
        view = flat(data)
        self._do(f"put {path!r}", lambda: self.backend.put(checked_path(path), view), view.nbytes, writes=True)

    def create(self, path: str) -> ObjectWriter:
        operation = f"create {path!r}"
        writer = self._do(operation, lambda: self.backend.create(checked_path(path)), writes=True)
        return _BoundedWriter(writer, operation, self.timeout_s, partial(self._fail, writes=True))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        checked_path(path)
        operation = f"put_if_absent {path!r}"
        try:
            self._retry(operation, lambda: self.backend.put_if_absent(path, data))
        except FileExistsError:
            return self._holds(path, data) is True
        except GaveUpError as error:
            with suppress(StorageError):
                if (held := self._holds(path, data)) is not None:
                    return held
            self._fail(error, operation, writes=True)
        except Exception as error:
            self._fail(error, operation, writes=True)
        return True

    def read(self, path: str) -> bytes:
        return self._do(f"read {path!r}", lambda: self.backend.read(checked_path(path)))

    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        try:
            return self._do(f"read {path!r}", lambda: self.backend.read_versioned(checked_path(path)))
        except ObjectMissingError:
            return None

    def replace_if(self, path: str, data: bytes, version: str | None) -> bool:
        if version is None:
            return self.put_if_absent(path, data)
        checked_path(path)
        operation = f"replace_if {path!r}"
        try:
            self._retry(operation, lambda: self.backend.replace_if(path, data, version))
        except (FileExistsError, FileNotFoundError):
            return self._holds(path, data) is True
        except GaveUpError as error:
            # Other bytes prove nothing here: the old ones may simply still be there.
            with suppress(StorageError):
                if self._holds(path, data):
                    return True
            self._fail(error, operation)
        except Exception as error:
            self._fail(error, operation)
        return True

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        view = flat(buffer)
        if not view.nbytes:
            self.size(path)
            return
        try:
            self._do(f"read {path!r}", lambda: self.backend.read_into(checked_path(path), start, view), view.nbytes)
        except EOFError:
            raise DamagedError(
                f"{path!r} in {self.url} ends too early: expected bytes {start} to {start + view.nbytes},"
                f" found {self.size(path)} bytes in all; restore another checkpoint"
            ) from None

    def size(self, path: str) -> int:
        return self._do(f"size of {path!r}", lambda: self.backend.size(checked_path(path)))

    def list(self, prefix: str) -> Listing:
        folder = checked_path(prefix.rstrip("/")) if prefix else ""
        try:
            found = self._do(f"list {prefix!r}", lambda: self.backend.list(folder))
        except ObjectMissingError:
            return []
        return sorted(found, key=lambda info: info.path)

    def delete(self, path: str) -> None:
        try:
            self._do(f"delete {path!r}", lambda: self.backend.delete(checked_path(path)))
        except ObjectMissingError:
            return

    def check(self) -> None:
        path = f"{PRIVATE_DIR}/probe-{uuid.uuid4().hex}"
        try:
            created = [self.put_if_absent(path, text) for text in (b"first", b"second")]
            held = self.read(path)
        finally:
            self._forget(path)
        if self.exclusive and (created != [True, False] or held != b"first"):
            raise UnsafeStoreError(
                f"{self.url} does not honour exclusive creation: a second writer replaced the first one's"
                " object, so two coordinators could damage each other's checkpoints. Use a store (or a newer"
                " version of it, or of its fsspec package) with conditional writes"
            )

    def _forget(self, path: str) -> None:
        """Remove the probe; a failure here must not hide the reason why the check failed."""
        try:
            self.delete(path)
        except StorageError:
            return

    def _holds(self, path: str, data: bytes) -> bool | None:
        """Whether the object holds exactly these bytes; None where there is no object.

        Asked after a conditional write that failed or whose reply was lost: a retry meets its own
        object, so a failed condition alone says nothing, but contents are unique to their writer.
        """
        try:
            return self.read(path) == data
        except ObjectMissingError:
            return None

    def _retry(self, operation: str, call: Callable[[], T], nbytes: int = 0) -> T:
        time_s = deadline_s(self.timeout_s, nbytes)
        return retrying(call, f"{operation} in {self.url}", self.backend.attempts, time_s, self._sleep)

    def _do(self, operation: str, call: Callable[[], T], nbytes: int = 0, *, writes: bool = False) -> T:
        """The call with retries and its errors translated; `EOFError` is left to `read_into`."""
        try:
            return self._retry(operation, call, nbytes)
        except EOFError:
            raise
        except Exception as error:
            self._fail(error, operation, writes=writes)

    def _fail(self, error: Exception, operation: str, *, writes: bool = False) -> NoReturn:
        raised = translated(error, self.url, operation, self.options, writes=writes)
        raise raised from raised.__cause__


class _BoundedWriter(ObjectWriter):
    """Gives each call of a backend's writer its time and its errors in our terms, and ends it exactly once."""

    def __init__(
        self, inner: ObjectWriter, operation: str, timeout_s: float, fail: Callable[[Exception, str], NoReturn]
    ) -> None:
        self._inner = inner
        self._operation = operation
        self._timeout_s = timeout_s
        self._fail = fail
        self._nbytes = 0
        self._ended = False

    def write(self, data: BytesLike) -> None:
        view = flat(data)
        self._nbytes += view.nbytes
        self._do(lambda: self._inner.write(view), view.nbytes)

    def commit(self) -> None:
        if self._ended:
            return
        try:
            # Only now may all of it go to the disk.
            self._do(self._inner.commit, self._nbytes)
            self._ended = True
        except Exception:
            self.abort()
            raise

    def abort(self) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            within(self._timeout_s, self._inner.abort)
        except Exception as error:
            # What is left over is invisible, and the reason for the abort is what the caller must see.
            logger.warning("%s: could not clean up: %s", self._operation, type(error).__name__)

    def _do(self, call: Callable[[], None], nbytes: int) -> None:
        try:
            within(deadline_s(self._timeout_s, nbytes), call)
        except Exception as error:
            self._fail(error, self._operation)
