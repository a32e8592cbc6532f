"""A host's snapshot memory: slots that outlive the processes that fill, write and free them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ray_ckpt.protocol.messages import SegmentInfo
from ray_ckpt.testing.simulator.world import Process
from ray_ckpt.types import Layout


@dataclass(slots=True, eq=False)
class Slot:
    """One segment. ``contents``: for each writer of the rank, the shard's entries. ``replica``: for copies only."""

    name: str
    rank: int
    replica: bool = False
    state: Literal["empty", "filling", "sealed", "kept"] = "empty"
    fills: int = 0
    sealed_at: float = 0.0
    owner: Process | None = None
    info: SegmentInfo | None = None
    layout: Layout | None = None
    contents: list[list[Any]] = field(default_factory=list)
    tries: dict[int, tuple[int, int]] = field(default_factory=dict)
    users: set[Process] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether all of a snapshot is there."""
        return self.state in ("sealed", "kept")

    @property
    def free(self) -> bool:
        """Whether it can be filled: empty, kept for a restart alone, or left half filled by a process that is dead."""
        return self.state in ("empty", "kept") or (
            self.state == "filling" and self.owner is not None and not self.owner.alive
        )

    def begin(self, owner: Process) -> None:
        """Start to fill it."""
        self.state, self.owner = "filling", owner
        self.fills += 1
        self.info, self.layout, self.contents, self.tries = None, None, [], {}

    def seal(
        self, info: SegmentInfo, layout: Layout, contents: list[list[Any]], now: float, *, keep: bool = False
    ) -> None:
        """Declare it whole; ``keep``: for a restart alone."""
        self.info, self.layout, self.contents = info, layout, contents
        self.sealed_at = now
        self.state = "kept" if keep else "sealed"

    def release(self) -> None:
        """Not needed any more."""
        self.state = "empty"

    def next_try(self, writer: int, order: int) -> int | None:
        """The number of this writer's next try for an attempt, never given twice; None for an attempt that is over."""
        last_order, number = self.tries.get(writer, (order, 0))
        if last_order > order:
            return None
        number = number if last_order == order else 0
        self.tries[writer] = (order, number + 1)
        return number
