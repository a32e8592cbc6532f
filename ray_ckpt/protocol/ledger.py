"""The coordinator's hold on the commit log: one append at a time, fenced by epoch.

I4: an append is the exclusive creation of the next sequence number, so of two coordinators that believe to own a
directory only one gets it; the other reads what is there, sees a higher epoch and stands down for ever. An append
whose answer is lost is repeated unchanged until it is answered: whatever of it arrives late can only meet itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, Literal

from ray_ckpt.protocol.flows import (
    Append,
    Flow,
    Flows,
    Io,
    IoFailedError,
    PruneLog,
    ReadForeign,
    ReadHead,
    RepairState,
    Until,
)
from ray_ckpt.types import LogRecord

_BACKOFF_S = 1.0
_PRUNE_EVERY = 32

Build = Callable[[LogRecord], "LogRecord | None"]
Done = Callable[[LogRecord], None]


class Ledger:
    """Owns ``head``, the newest record of this epoch. ``now`` is set by the coordinator at each event.

    ``appending``: the kind of the record on its way to the log, empty for none. It may be there already, so what it
    decides stands whatever happens to those whom it is for.
    """

    def __init__(self, flows: Flows, owner: str) -> None:
        self.flows = flows
        self.owner = owner
        self.now = 0.0
        self.phase: Literal["starting", "active", "fenced"] = "starting"
        self.epoch = 0
        self.trouble = ""
        self.appending = ""
        self._head: LogRecord | None = None
        self._queue: deque[tuple[Build, Done]] = deque()
        self._state_dirty = True

    def start(self) -> None:
        """Take the directory over, then serve appends."""
        self.flows.start(self._serve())
        self.flows.start(self._keep_state())

    @property
    def head(self) -> LogRecord:
        """The newest record; only once the phase is no longer "starting"."""
        assert self._head is not None, "the ledger is not open yet"
        return self._head

    @property
    def active(self) -> bool:
        """Whether this coordinator owns the directory, as far as it knows."""
        return self.phase == "active"

    def submit(self, build: Build, done: Done) -> None:
        """Queue an append. ``build`` makes the record from the head of that moment (None: not needed any more);
        ``done`` hears of the record once it is in the log.
        """
        self._queue.append((build, done))

    def next_record(self, kind: Any, **changes: Any) -> LogRecord:
        """The record after ``head``, with everything carried over that ``changes`` does not name."""
        fresh = {"attempt": "", "step": -1, "reason": "", **changes}
        return replace(self.head, sequence=self.head.sequence + 1, kind=kind, owner=self.owner, time=self.now, **fresh)

    def fence(self) -> None:
        """A newer epoch owns the directory."""
        self.phase = "fenced"

    # -- flows --------------------------------------------------------------------------------------

    def _serve(self) -> Flow:
        yield from self._claim()
        while True:
            yield Until(lambda: bool(self._queue))
            build, done = self._queue.popleft()
            record = build(self.head)
            if record is None:
                continue
            self.appending = record.kind
            won, _ = yield from self.retry(Append(record))
            if not won:
                self.fence()
                return
            self.appending = ""
            self._head = record
            self._state_dirty = True
            done(record)

    def _claim(self) -> Generator[Io | Until, Any, None]:
        head = yield from self.retry(ReadHead())
        foreign = () if head else (yield from self.retry(ReadForeign()))
        while True:
            record = self._claim_record(head, foreign)
            won, top = yield from self.retry(Append(record))
            if won:
                break
            head = top
        self._head = record
        self.epoch = record.epoch
        self.phase = "active"

    def _claim_record(self, head: LogRecord | None, foreign: tuple[Any, ...]) -> LogRecord:
        if head is None:
            high = max((c.step for c in foreign), default=-1)
            return LogRecord(1, "claim", 1, self.owner, self.now, tuple(foreign), (), None, high, directory=self.owner)
        return replace(
            head,
            sequence=head.sequence + 1,
            kind="claim",
            epoch=head.epoch + 1,
            owner=self.owner,
            time=self.now,
            attempt="",
            step=-1,
            reason="",
        )

    def _keep_state(self) -> Flow:
        """Bring the `checkpoint` file up to date after appends, several at once where they come fast."""
        pruned_at = 0
        while True:
            yield Until(lambda: self._state_dirty and self.active)
            self._state_dirty = False
            yield from self.retry(RepairState())
            if self.head.sequence >= pruned_at + _PRUNE_EVERY:
                pruned_at = self.head.sequence
                yield from self.retry(PruneLog())

    def retry(self, io: Io) -> Generator[Io | Until, Any, Any]:
        """Repeat an action until it is answered; storage that is down is waited for and shown as trouble."""
        while True:
            try:
                result = yield io
            except IoFailedError as error:
                self.trouble = f"{type(io).__name__}: {error}"
                again = self.now + _BACKOFF_S
                yield Until(lambda again=again: self.now >= again)  # type: ignore[misc]
            else:
                self.trouble = ""
                return result
