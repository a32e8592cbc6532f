"""Reading the checkpoint that will most probably be chosen, while the other ranks are still coming.

If another one is chosen, or the bytes lie in host memory, that reading was in vain and is ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray_ckpt import log
from ray_ckpt.protocol.messages import RestoreWish
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.storage import Reader, Store
from ray_ckpt.types import Checkpoint

logger = logging.getLogger(__name__)

_END_S = 1.0

Build = Callable[[], Any]
Read = Callable[[StoredCheckpoint], Build]
"""Reads and verifies all that a state needs; what it gives builds the state."""


class ReadAhead:
    """One reading in a thread of its own."""

    def __init__(self, store: Store, wish: RestoreWish, read: Read, by: str) -> None:
        self._store = store
        self._wish = wish
        self._read = read
        self._by = by
        self._ended = threading.Event()
        self._found: tuple[tuple[str, str, int], Build] | None = None
        self._thread = threading.Thread(target=self._run, name="ray-ckpt-ahead", daemon=True)
        self._thread.start()

    def take(self, checkpoint: Checkpoint) -> Build | None:
        """What was read of this checkpoint; waits for it. None if it was another one, or could not be read."""
        self._thread.join()
        return self._found[1] if self._found is not None and self._found[0] == _id(checkpoint) else None

    def end(self) -> None:
        """It is not wanted: no further byte is read. An operation that hangs is not waited for."""
        self._ended.set()
        self._thread.join(_END_S)
        self._found = None

    def _run(self) -> None:
        try:
            checkpoint = self._likely()
            if checkpoint is not None:
                with log.pin(self._store, checkpoint.prefix, by=self._by):
                    stored = open_checkpoint(self._store, checkpoint)
                    # TensorFlow reads a store's own files.
                    own = stored if self._wish.stored else replace(stored, store=_Ending(stored.store, self._ended))
                    self._found = _id(checkpoint), self._read(own)
        except Exception as error:
            # It is met again, and told, when this checkpoint is chosen.
            logger.debug("%s: nothing was read ahead: %s", self._store.url, error)

    def _likely(self) -> Checkpoint | None:
        """What this wish will most probably get; None where that cannot be told."""
        live = log.live_checkpoints(self._store)
        wish = self._wish
        found = [c for c in live if (c.step == wish.step if wish.kind == "step" else not c.superseded)]
        if not found or (wish.kind == "newest" and _is_newer_claimed(self._store, live)):
            return None
        return found[-1]


class _Ended(Exception):
    """Nobody wants what is read."""


class _Ending(Reader):
    """Reads on until it is told to end."""

    def __init__(self, inner: Reader, ended: threading.Event) -> None:
        self.url = inner.url
        self._inner = inner
        self._ended = ended

    def _check(self) -> None:
        if self._ended.is_set():
            raise _Ended

    def read(self, path: str) -> bytes:
        self._check()
        return self._inner.read(path)

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        self._check()
        self._inner.read_into(path, start, buffer)

    def size(self, path: str) -> int:
        self._check()
        return self._inner.size(path)


def _id(checkpoint: Checkpoint) -> tuple[str, str, int]:
    """What no two checkpoints of a directory share; marks in the log may change meanwhile."""
    return checkpoint.prefix, checkpoint.attempt, checkpoint.step


def _is_newer_claimed(store: Store, live: Sequence[Checkpoint]) -> bool:
    """Whether agents of the start before may be finishing a save at this moment, which would then be chosen."""
    prefixes, newest = {c.prefix for c in live}, max(c.step for c in live)
    return any(claim.step > newest and claim.prefix not in prefixes for claim in log.list_claims(store))
