"""A worker's snapshot memory: the segments that its agent made, mapped and warmed off the training thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from ray_ckpt.errors import RayCkptError
from ray_ckpt.snapshot import Segment, SegmentState

_CLOSE_S = 1.0

Prepare = Callable[[int], list[str]]
"""Data bytes -> paths of segments that hold so many."""


class Slots:
    """The segments of one rank. `grow` runs in the background; `free` and `fill` belong to the training thread."""

    def __init__(self, prepare: Prepare, changed: Callable[[], None]) -> None:
        self._prepare = prepare
        self._changed = changed
        self._lock = threading.Lock()
        self._segments: dict[str, Segment] = {}
        self._nbytes = -1
        self._closed = False
        self._thread: threading.Thread | None = None
        self.error: RayCkptError | None = None

    def grow(self, nbytes: int) -> None:
        """See to it, in the background, that there are segments of this size."""
        with self._lock:
            if self._closed or nbytes <= self._nbytes or (self._thread is not None and self._thread.is_alive()):
                return
            self.error = None
            self._thread = threading.Thread(target=self._grow, args=(nbytes,), name="ray-ckpt-memory", daemon=True)
            self._thread.start()

    def _grow(self, nbytes: int) -> None:
        try:
            fresh = {}
            for path in self._prepare(nbytes):
                segment = self._segments.get(path)
                if segment is None or segment.data_nbytes < nbytes:
                    segment = Segment.open(path, writable=True)
                    segment.populate()
                fresh[path] = segment
        except RayCkptError as error:
            self.error = error
        else:
            with self._lock:
                if self._closed:
                    old = list(fresh.values())
                else:
                    old = [s for path, s in self._segments.items() if fresh.get(path) is not s]
                    self._segments, self._nbytes = fresh, nbytes
            for segment in old:
                segment.close()
        self._changed()

    def free(self, nbytes: int, loose: Collection[tuple[int, int]] | None = None) -> Segment | None:
        """A segment of at least this size that nobody needs, None if there is none now.

        An empty one, else the one whose snapshot, kept only for a restart, is the oldest; with ``loose`` only of those
        (generation, step).
        """
        with self._lock:
            for path in [path for path, segment in self._segments.items() if segment.lent]:
                # A state was restored from it; there are fewer now than were asked for.
                self._segments.pop(path).close()
                self._nbytes = -1
            large = [segment for segment in self._segments.values() if segment.data_nbytes >= nbytes]
        kept = []
        for segment in large:
            state = segment.state
            if state is SegmentState.EMPTY:
                return segment
            if state is SegmentState.KEPT and (loose is None or _save_of(segment) in loose):
                kept.append(segment)
        return min(kept, key=lambda segment: segment.sealed_at, default=None)

    @property
    def nbytes(self) -> int:
        """The size that the present segments have at least; -1 before the first."""
        return self._nbytes

    def close(self) -> None:
        """Unmap all segments; what is sealed stays with the agent."""
        with self._lock:
            self._closed = True
        if self._thread is not None:
            # The agent may not answer it for minutes; it closes what it opens after this.
            self._thread.join(_CLOSE_S)
        with self._lock:
            for segment in self._segments.values():
                segment.close()
            self._segments = {}


def _save_of(segment: Segment) -> tuple[int, int] | None:
    save = segment.save
    return None if save is None else (save.generation, save.step)
