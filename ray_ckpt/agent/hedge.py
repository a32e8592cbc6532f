"""A second try of a shard that takes much longer than others did: the first of the two that is done counts.

One server, one connection or one process that is slow would hold up the whole save. The rule has no clock of its own:
what the last shards took, as their writers say, tells what is slow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ray_ckpt.errors import SaveError
from ray_ckpt.types import ShardReport

T = TypeVar("T")
logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""A process may take so long to start."""

FACTOR = 3.0
"""A try that takes so many times as long as the slowest of the last ones is a straggler."""

_LAST = 8
_LEAST_NBYTES = 1 << 20
"""What smaller shards take does not depend on their size."""

NextTry = Callable[[], Coroutine[Any, Any, ShardReport] | None]
"""Makes the next try of a shard, under a number that none had before; None: no number is left."""


class Pace:
    """What the last shards of this host took."""

    def __init__(self) -> None:
        self._seconds_per_byte: deque[float] = deque(maxlen=_LAST)

    def note(self, nbytes: int, seconds_s: float) -> None:
        """A shard of about so many bytes is done."""
        self._seconds_per_byte.append(seconds_s / max(nbytes, _LEAST_NBYTES))

    def patience_s(self, nbytes: int) -> float | None:
        """After how long a try of so many bytes is a straggler; None before the first shard is done."""
        if not self._seconds_per_byte:
            return None
        return max(PATIENCE_S, FACTOR * max(self._seconds_per_byte) * max(nbytes, _LEAST_NBYTES))


class Hedge:
    """Has the shards of one host tried. At most one of them has two tries at a time: a storage that is slow as a whole
    must not get twice the work.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._second: str | None = None

    async def write(self, what: str, nbytes: int, next_try: NextTry) -> ShardReport:
        """The report of the first try that succeeds, of one or two; every try has ended by then.

        ``what`` names the shard for the log, ``nbytes`` is about its size.

        Raises:
            SaveError: no try is left, or none would help.
            StorageError: the tries have failed; of two, the error of the last.
        """
        first = next_try()
        if first is None:
            raise SaveError("no try was left")
        second: list[Coroutine[Any, Any, ShardReport]] = []
        warned = False

        def another() -> Coroutine[Any, Any, ShardReport] | None:
            nonlocal warned
            made = None if self._second is not None else next_try()
            if made is not None:
                self._second = what
                second.append(made)
            if not warned or made is not None:
                _warn(what, nbytes, patience_s, self._second, hedged=made is not None)
            warned = True
            return made

        patience_s = self.pace.patience_s(nbytes) or 0.0
        try:
            report = await first_of(first, another, patience_s)
        finally:
            if second:
                self._second = None
        self.pace.note(nbytes, report.seconds_s)
        if second:
            logger.warning("%s: try %d was done first", what, report.attempt_try + 1)
        return report


def _warn(what: str, nbytes: int, patience_s: float, other: str | None, *, hedged: bool) -> None:
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - patience_s))
    if hedged:
        then = "a second try begins beside it, under another name"
    else:
        then = f"no second try now: {'none is left' if other is None else f'{other} has one'}"
    logger.warning(
        "straggler: %s, about %d bytes, has been written since %s (%.0f s), much longer than the last ones took; %s",
        what, nbytes, since, patience_s, then,
    )  # fmt: skip


async def first_of(
    first: Coroutine[Any, Any, T], another: Callable[[], Coroutine[Any, Any, T] | None], patience_s: float
) -> T:
    """The result of ``first``, or of ``another()`` if that succeeds before. The other one is cancelled then, and has
    ended on return.

    ``another`` is asked each time ``patience_s`` have passed, until it gives one; 0: never. If both fail, the last
    error is raised.
    """
    tasks: set[asyncio.Future[T]] = {asyncio.ensure_future(first)}
    try:
        pending = tasks
        while patience_s and pending and len(tasks) == 1:
            _, pending = await asyncio.wait(tasks, timeout=patience_s)
            if pending and (made := another()) is not None:
                tasks.add(asyncio.ensure_future(made))
        return await _first_success(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_success(tasks: set[asyncio.Future[T]]) -> T:
    pending = tasks
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        best = next((task for task in done if task.exception() is None), None)
        if best is not None:
            return best.result()
        if not pending:
            return done.pop().result()
