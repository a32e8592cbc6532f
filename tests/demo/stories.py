"""Made-up stories of training processes, for the tests of what is done with them."""

from __future__ import annotations

from pathlib import Path

from examples.demo.drill import Outcome
from examples.demo.journal import Restored, Step, Story
from ray_ckpt.timeline import ShardSpan, SnapshotSpan, Timeline


def story(start: int, rank: int, steps: range, *, restored: int | None, at: float, host: int | None = None) -> Story:
    """One second a step; the loss of step s is 10 / (s + 1), on the fixed batch 9 / (s + 1); odd steps are saved."""
    made = Story(Path("unused"), start, rank, rank if host is None else host)
    made.restored = Restored(restored, at, 0.5, 9 / ((restored or 0) + 1))
    for i, step in enumerate(steps):
        began = at + 1 + i
        stalled = 0.01 * (step % 2)
        made.steps.append(Step(step, began, began + 0.9, began + 1, 10 / (step + 1), 9 / (step + 1), stalled))
    return made


def timeline(step: int, generation: int, ranks: int, committed: float) -> Timeline:
    """A save whose shards were written in the half second before its commit."""
    snapshots = tuple(SnapshotSpan(r, committed - 0.8, committed - 0.7, "cadence") for r in range(ranks))
    shards = tuple(ShardSpan(r, r, f"h{r}", 0, 1000, committed - 0.6, committed - 0.1) for r in range(ranks))
    attempt = f"e1-{step}"
    return Timeline(step, generation, attempt, f"model.ckpt-{step}", committed - 0.9, committed, snapshots, shards)


def outcome() -> Outcome:
    """Three hosts until step 5, of which host 1 is killed; two go on until step 9. Steps 1, 3, 5, 7 are committed."""
    return Outcome(
        before=[story(1, rank, range(1, 6), restored=None, at=100.0) for rank in range(3)],
        after=[story(2, rank, range(6, 10), restored=5, at=120.0, host=host) for rank, host in enumerate((0, 2))],
        killed_at=106.2,
        killed_step=5,
        killed_host=1,
        newest=5,
        committed={1, 3, 5, 7},
    )


def saves() -> list[Timeline]:
    """The timelines of the outcome's commits."""
    return [timeline(1, 1, 3, 102.5), timeline(3, 1, 3, 104.5), timeline(5, 1, 3, 106.5), timeline(7, 2, 2, 123.5)]
