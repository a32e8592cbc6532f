"""One save under way, as the coordinator sees it.

claiming --> writing --> indexing --> committing --> committed
    |           |            |             |
    +-----------+------------+-------------+--> failed
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ray_ckpt.protocol.messages import BASENAME, HostReport, SegmentInfo, WriteOrder
from ray_ckpt.types import ShardReport

Stage = Literal["claiming", "writing", "indexing", "committing", "committed", "failed"]

TRANSITIONS: dict[Stage, tuple[Stage, ...]] = {
    "claiming": ("writing", "failed"),
    "writing": ("indexing", "failed"),
    "indexing": ("committing", "failed"),
    "committing": ("committed", "failed"),
    "committed": (),
    "failed": (),
}
"""The documentation's diagram is drawn from this table."""

Key = tuple[int, int]


@dataclass(slots=True)
class SaveState:
    """One save under way. ``key`` is (generation, step); ``failure`` set means that it must not commit any more.

    ``holders``: by rank, the host with its snapshot; ``replicas``: one with a copy of it; ``taken_over``: the one that
    writes its copy since the first is gone. That happens once a rank: two hosts' tries would share their numbers.
    """

    key: Key
    attempt: str
    plan_id: str
    world_size: int
    num_writers: int
    max_tries: int
    opened: float
    deadline: float
    stage: Stage = "claiming"
    prefix: str = ""
    segments: dict[int, SegmentInfo] = field(default_factory=dict)
    holders: dict[int, str] = field(default_factory=dict)
    replicas: dict[int, str] = field(default_factory=dict)
    taken_over: dict[int, str] = field(default_factory=dict)
    copies: int = 1
    shards: dict[int, ShardReport] = field(default_factory=dict)
    failure: str | None = None
    quiet: bool = False
    fatal: bool = False
    nbytes: int = 0
    appending: bool = False
    basename: str = BASENAME

    @property
    def step(self) -> int:
        """The training step that is saved."""
        return self.key[1]

    @property
    def sealed(self) -> bool:
        """All ranks hold a snapshot."""
        return len(self.segments) == self.world_size

    @property
    def whole(self) -> bool:
        """All ranks hold a snapshot and all their shards are safe."""
        return self.sealed and len(self.shards) == self.num_writers

    @property
    def order(self) -> WriteOrder:
        """What the hosts are told to write."""
        return WriteOrder(
            self.attempt, *self.key, self.plan_id, self.prefix, self.num_writers, self.max_tries, copies=self.copies
        )

    def order_for(self, report: HostReport) -> WriteOrder:
        """The order as one host gets it: with what has arrived of its own writers' work, not of all others'."""
        held = [range(s.writer_base, s.writer_base + s.writers) for s in report.segments if s.save == self.key]
        mine = {w for writers in held for w in writers}
        mine.update(shard.writer for shard in report.shards if shard.attempt == self.attempt)
        ranks = tuple(sorted(rank for rank, host in self.taken_over.items() if host == report.host))
        return replace(self.order, done=tuple(sorted(mine & self.shards.keys())), replicas=ranks)

    def to(self, stage: Stage) -> None:
        """Change the stage; an impossible change is a bug and tells the save's story."""
        if stage not in TRANSITIONS[self.stage]:
            raise AssertionError(f"{self.stage} -> {stage} is impossible: {self}")
        self.stage = stage

    def fail(self, reason: str, *, quiet: bool = False, fatal: bool = False) -> None:
        """Decide that this save must not commit; the first reason stands.

        Too late once its record is on the way to the log: then only the log knows.
        """
        if self.failure is None and not self.appending:
            self.failure, self.quiet, self.fatal = reason, quiet, fatal


def writers_of(segment: SegmentInfo) -> range:
    """The writers of a snapshot, numbered in the whole job."""
    return range(segment.writer_base, segment.writer_base + segment.writers)
