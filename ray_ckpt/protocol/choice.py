"""What a start restores: a checkpoint in the store, or a snapshot in the memory of hosts that is newer.

See docs/design/0004-memory-tiers.md, "Who may restore what".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ray_ckpt.protocol.messages import JobConfig, Problem, RestoreWish
from ray_ckpt.protocol.recall import Recall
from ray_ckpt.protocol.roster import Save
from ray_ckpt.types import Checkpoint


@dataclass(frozen=True, slots=True)
class Choice:
    """What a start restores: a checkpoint, or a snapshot that is newer than the newest one (``base``), or nothing."""

    checkpoint: Checkpoint | None
    snapshot: Save | None = None
    base: Checkpoint | None = None

    @property
    def step(self) -> int | None:
        """The step that it is of."""
        if self.snapshot is not None:
            return self.snapshot[1]
        return self.checkpoint.step if self.checkpoint is not None else None

    def mark(self, live: tuple[Checkpoint, ...]) -> tuple[Checkpoint, ...]:
        """All that was committed after what is restored is superseded; that itself is not, whatever it was.

        Of a choice of nothing: the run starts afresh and replaces all that is there.
        """
        last = self.base if self.snapshot is not None else self.checkpoint
        # By name: what the log says of it besides may have changed since the choice.
        after = [c.prefix for c in live].index(last.prefix) if last is not None else -1
        return tuple(
            replace(c, superseded=True) if i > after else (replace(c, superseded=False) if i == after else c)
            for i, c in enumerate(live)
        )


def choose(
    live: Sequence[Checkpoint], recall: Recall, wish: RestoreWish, bad: Collection[str] = (), tried: Save | None = None
) -> Choice:
    """What a wish gets. ``bad``: prefixes that were found damaged; ``tried``: what this start could not read."""
    sound = [c for c in live if c.prefix not in bad]
    if wish.kind == "none":
        return Choice(None)
    if wish.kind == "step":
        return Choice(next((c for c in reversed(sound) if c.step == wish.step), None))
    newest = next((c for c in reversed(sound) if not c.superseded), None)
    snapshot = None if wish.stored else recall.newer_than(newest, tried)
    return Choice(newest) if snapshot is None else Choice(None, snapshot, newest)


def hindrance(live: Sequence[Checkpoint], wish: RestoreWish, config: JobConfig) -> Problem | None:
    """Why a start with this wish cannot be."""
    usable = [c for c in live if not c.superseded]
    if wish.kind == "step" and all(c.step != wish.step for c in live):
        steps = ", ".join(str(c.step) for c in live) or "none at all"
        return Problem("NoCheckpointError", f"step {wish.step} is not among the checkpoints: {steps}")
    if wish.kind == "none" and usable and not config.fresh:
        return Problem(
            "UsageError",
            f"the directory holds checkpoints up to step {usable[-1].step}, but the job trains without a "
            "restore(): call restore() first, or pass fresh=True to let the new run replace them",
        )
    return None
