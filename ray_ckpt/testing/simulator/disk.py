"""The simulated store: objects, conditional writes, stale listings, and a `Store` whose caller can be paused.

The code under simulation is written for a blocking `Store`. To let other processes act between two of its operations,
a call runs against a recording: at the first operation without a recorded answer it is left by `Pause`; once the
world has carried the operation out, the call is made again from its start and gets all answers so far. That is exact
as long as the code's behaviour depends on nothing but its arguments and the answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray_ckpt.errors import ObjectMissingError
from ray_ckpt.storage import ObjectInfo, ObjectWriter, Store
from ray_ckpt.storage.base import BytesLike, Listing

READS = frozenset({"read", "read_versioned", "list", "size"})
_REMEMBERED = 8


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on one object (or one listing)."""

    kind: str
    path: str
    data: bytes = b""
    version: str | None = None

    @property
    def writes(self) -> bool:
        """Whether it may change an object."""
        return self.kind not in READS


@dataclass(frozen=True, slots=True)
class Mutation:
    """One object that changed: ``before`` and ``after`` are its contents, None where it is not there."""

    actor: str
    op: Op
    before: bytes | None
    after: bytes | None


class Disk:
    """All objects of one directory. ``watchers`` hear of every mutation, right after it."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.watchers: list[Callable[[Mutation], None]] = []
        self._versions: dict[str, int] = {}
        self._count = 0
        self._recent: deque[tuple[str, bytes | None]] = deque(maxlen=_REMEMBERED)

    def apply(self, op: Op, actor: str, stale: int = 0) -> Any:
        """Carry an operation out; a read may return an `ObjectMissingError`. ``stale``: how many of the last
        mutations a listing misses.
        """
        return getattr(self, f"_{op.kind}")(op, actor, stale)

    def _read(self, op: Op, *_: Any) -> Any:
        return self.objects.get(op.path, ObjectMissingError(f"{op.path} is not there"))

    def _read_versioned(self, op: Op, *_: Any) -> Any:
        held = self.objects.get(op.path)
        return None if held is None else (held, str(self._versions[op.path]))

    def _size(self, op: Op, *_: Any) -> Any:
        held = self.objects.get(op.path)
        return ObjectMissingError(f"{op.path} is not there") if held is None else len(held)

    def _list(self, op: Op, _: str, stale: int) -> Listing:
        shown = self.objects
        if stale:
            shown = dict(shown)
            for path, before in list(self._recent)[: -stale - 1 : -1]:
                if before is None:
                    shown.pop(path, None)
                else:
                    shown[path] = before
        start = f"{op.path}/" if op.path else ""
        return [ObjectInfo(path, len(data), 0.0) for path, data in sorted(shown.items()) if path.startswith(start)]

    def _put(self, op: Op, actor: str, _: int) -> None:
        self._set(op, actor, op.data)

    def _put_if_absent(self, op: Op, actor: str, _: int) -> bool:
        if op.path in self.objects:
            return self.objects[op.path] == op.data
        self._set(op, actor, op.data)
        return True

    def _replace_if(self, op: Op, actor: str, _: int) -> bool:
        if op.path not in self.objects or str(self._versions[op.path]) != op.version:
            return self.objects.get(op.path) == op.data
        self._set(op, actor, op.data)
        return True

    def _delete(self, op: Op, actor: str, _: int) -> None:
        if op.path in self.objects:
            self._set(op, actor, None)

    def _set(self, op: Op, actor: str, data: bytes | None) -> None:
        before = self.objects.get(op.path)
        self._recent.append((op.path, before))
        if data is None:
            del self.objects[op.path]
        else:
            self._count += 1
            self.objects[op.path] = data
            self._versions[op.path] = self._count
        for watcher in self.watchers:
            watcher(Mutation(actor, op, before, data))


class Pause(BaseException):
    """Leaves a call at an operation that is still to be carried out."""

    def __init__(self, op: Op) -> None:
        super().__init__(op)
        self.op = op


class RecordedStore(Store):
    """Gives the recorded answers, then pauses."""

    url = "sim://run"
    exclusive = True

    def __init__(self, answers: list[Any]) -> None:
        self._answers = answers
        self._next = 0

    def _ask(self, op: Op) -> Any:
        if self._next == len(self._answers):
            raise Pause(op)
        answer = self._answers[self._next]
        self._next += 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def put(self, path: str, data: BytesLike) -> None:
        """See `Store`."""
        self._ask(Op("put", path, bytes(data)))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """See `Store`."""
        return bool(self._ask(Op("put_if_absent", path, data)))

    def read(self, path: str) -> bytes:
        """See `Store`."""
        return bytes(self._ask(Op("read", path)))

    def read_versioned(self, path: str) -> tuple[bytes, str] | None:
        """See `Store`."""
        answer: tuple[bytes, str] | None = self._ask(Op("read_versioned", path))
        return answer

    def replace_if(self, path: str, data: bytes, version: str | None) -> bool:
        """See `Store`."""
        if version is None:
            return self.put_if_absent(path, data)
        return bool(self._ask(Op("replace_if", path, data, version)))

    def size(self, path: str) -> int:
        """See `Store`."""
        return int(self._ask(Op("size", path)))

    def list(self, prefix: str) -> Listing:
        """See `Store`."""
        found: Listing = self._ask(Op("list", prefix.rstrip("/")))
        return found

    def delete(self, path: str) -> None:
        """See `Store`."""
        self._ask(Op("delete", path))

    def create(self, path: str) -> ObjectWriter:
        """Not simulated: writers put whole objects."""
        raise NotImplementedError(path)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        """Not simulated: readers take whole objects."""
        raise NotImplementedError(path)

    def check(self) -> None:
        """Nothing to prove."""


class Call:
    """One call of code that uses a `Store`, carried on operation by operation."""

    def __init__(self, run: Callable[[Store], Any]) -> None:
        self._run = run
        self._answers: list[Any] = []
        self.done = False
        self.result: Any = None

    def advance(self) -> Op | None:
        """Go on to the next operation; None once the call has ended, with ``result`` or the error it raised."""
        try:
            self.result = self._run(RecordedStore(self._answers))
        except Pause as pause:
            return pause.op
        except Exception as error:
            self.result = error
        self.done = True
        return None

    def answer(self, answer: Any) -> None:
        """The result of the operation that `advance` named; an exception is raised at that place."""
        self._answers.append(answer)
