"""The time that the coordinator's deadlines run on."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_ADVANCE_S = 1.0


class Clock:
    """Seconds since the epoch at the start, and from there on only ever forward, whatever the wall clock does.

    It advances by `MAX_ADVANCE_S` at most from one look to the next: what this process itself has slept through
    (it was stopped, or its loop was blocked) is no silence of others, whose words may lie in its queue.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._monotonic = monotonic
        self._now = wall()
        self._looked = monotonic()

    def now(self) -> float:
        """The time now; look at least every `MAX_ADVANCE_S`, as `Coordinator` does with its ticks."""
        looked = self._monotonic()
        self._now += min(looked - self._looked, MAX_ADVANCE_S)
        self._looked = looked
        return self._now
