"""Sequential protocol steps as generators that yield their I/O and their waits.

A flow reads top to bottom like the protocol it implements, yet stays pure: it yields an `Io` and is resumed with
its result (or `IoFailedError`), or yields a `Until` and is resumed once the predicate holds. A crash is simply
the loss of the `Flows` object: nothing of it is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from ray_ckpt.types import Claim, LogRecord


class IoFailedError(Exception):
    """An action failed for good (the executor has retried what can be retried); the text says why."""


@dataclass(frozen=True, slots=True)
class Io:
    """Base of all actions that leave the pure core."""


@dataclass(frozen=True, slots=True)
class ReadHead(Io):
    """Result: the highest `LogRecord`, or None; adopting a plain TensorFlow directory is `ReadForeign`."""


@dataclass(frozen=True, slots=True)
class ReadForeign(Io):
    """Result: tuple of foreign `Checkpoint` of a directory without a log."""


@dataclass(frozen=True, slots=True)
class Append(Io):
    """Result: (won, the record now at the top). Exclusive creation of the record's sequence number."""

    record: LogRecord


@dataclass(frozen=True, slots=True)
class PutClaim(Io):
    """Result: None if this call created the claim, else the `Claim` that was there."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class HasIndex(Io):
    """Result: whether an index lies at this prefix, put by whomever."""

    prefix: str


@dataclass(frozen=True, slots=True)
class PutMetadata(Io):
    """Put the coordinator's own shard; result: its `types.ShardReport`. ``save`` is the `SaveState`."""

    save: Any


@dataclass(frozen=True, slots=True)
class PutIndex(Io):
    """Merge the runs of the shards and put the index; result: bytes of the whole checkpoint."""

    save: Any
    metadata: Any


@dataclass(frozen=True, slots=True)
class RepairState(Io):
    """Derive the `checkpoint` file from the log; result: ignored."""


@dataclass(frozen=True, slots=True)
class ReadState(Io):
    """Result: the prefixes that the `checkpoint` file names."""


@dataclass(frozen=True, slots=True)
class ListPins(Io):
    """Result: set of prefixes that a reader in any job is using."""


@dataclass(frozen=True, slots=True)
class ListClaims(Io):
    """Result: tuple of all `Claim` in the directory."""


@dataclass(frozen=True, slots=True)
class DeleteIndex(Io):
    """Remove the index of a prefix; result: ignored."""

    prefix: str


@dataclass(frozen=True, slots=True)
class DeleteData(Io):
    """Remove what belongs to a prefix beside its index; result: ignored.

    These are the data shards that are some of ``num_shards``, the graph (``.meta``) and the save's timeline.
    Files of another number of shards are not ours: TensorFlow may have written them beside.
    """

    prefix: str
    attempt: str
    num_shards: int


@dataclass(frozen=True, slots=True)
class DeleteClaim(Io):
    """Remove the claim of a prefix, the last trace of an attempt; result: ignored."""

    prefix: str


@dataclass(frozen=True, slots=True)
class PruneLog(Io):
    """Remove old log records; result: ignored."""


@dataclass(frozen=True, slots=True)
class Committed(Io):
    """A checkpoint is committed: write its timeline, tell listeners; result: ignored."""

    save: Any


@dataclass(frozen=True, slots=True)
class ListAgents(Io):
    """Result: the hosts that live and have an agent of this run, as Ray says; their names for people, by id."""


@dataclass(frozen=True, slots=True)
class Until:
    """Wait until the predicate holds; it is looked at after every event."""

    ready: Callable[[], bool]


Flow = Generator["Io | Until", Any, None]


class Flows:
    """Runs flows: hands out their I/O with ids, resumes them with results."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Until, Flow]] = []
        self._pending: dict[int, Flow] = {}
        self._outbox: list[tuple[int, Io]] = []
        self._next_id = 0

    def start(self, flow: Flow) -> None:
        """Run a new flow up to its first I/O or wait."""
        self._advance(flow, lambda: next(flow))

    def done(self, io_id: int, result: Any) -> None:
        """Resume the flow whose I/O this was; an unknown or repeated id is ignored."""
        flow = self._pending.pop(io_id, None)
        if flow is None:
            return
        if isinstance(result, IoFailedError):
            self._advance(flow, lambda: flow.throw(result))
        else:
            self._advance(flow, lambda: flow.send(result))

    def poll(self) -> None:
        """Resume every flow whose wait is over, until none is."""
        progress = True
        while progress:
            progress = False
            for item in list(self._waiting):
                until, flow = item
                if until.ready():
                    self._waiting.remove(item)
                    self._advance(flow, lambda flow=flow: flow.send(None))  # type: ignore[misc]
                    progress = True

    def take(self) -> list[tuple[int, Io]]:
        """The actions to execute now, with the id to answer each by."""
        outbox, self._outbox = self._outbox, []
        return outbox

    @property
    def idle(self) -> bool:
        """No I/O is under way (flows may still wait for events)."""
        return not self._pending

    def _advance(self, flow: Flow, resume: Callable[[], Io | Until]) -> None:
        try:
            wish = resume()
        except StopIteration:
            return
        if isinstance(wish, Until):
            self._waiting.append((wish, flow))
        else:
            self._next_id += 1
            self._pending[self._next_id] = flow
            self._outbox.append((self._next_id, wish))
