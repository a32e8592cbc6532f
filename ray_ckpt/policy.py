"""When to save and what to keep: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ray_ckpt.types import Checkpoint


def crosses(previous: int, step: int, every: int | None) -> bool:
    """Whether a multiple of ``every`` lies in (previous, step].

    Every worker that reports the same steps finds the same saves, whatever its stride.
    """
    return every is not None and step // every > previous // every


def next_crossing(step: int, every: int | None) -> float:
    """The first step after this one that crosses a multiple of ``every``, whatever is reported in between."""
    return float("inf") if every is None else (step // every + 1) * every


def align(step: int, seen: int, stride: int) -> int:
    """The smallest step >= ``step`` that a loop at ``seen`` with this stride will report."""
    return seen + -(-(step - seen) // stride) * stride


def first_crossing(seen: int, earliest: int, every: int, stride: int) -> int:
    """The first step >= ``earliest`` on the stride at which a multiple of ``every`` is crossed after ``seen``."""
    earliest = align(earliest, seen, stride)
    multiple = (max(earliest - stride, seen) // every + 1) * every
    return align(max(multiple, earliest), seen, stride)


class Retired(NamedTuple):
    """What retention lets go: deleted, or kept for good instead and counted no more."""

    deleted: list[Checkpoint]
    preserved: list[Checkpoint]


def retire(
    live: Sequence[Checkpoint],
    *,
    max_to_keep: int | None,
    keep_every_steps: int | None = None,
    keep_every_hours: float | None = None,
    hours_from: float | None = None,
    hours_grid: float | None = None,
    first_generation: int = 0,
    protected: frozenset[str] = frozenset(),
) -> Retired:
    """The checkpoints that are too many, superseded ones first, then the oldest.

    ``live`` is in commit order. Foreign and preserved ones, those of generations before ``first_generation``, those
    in ``protected`` (prefixes) and the newest that is not superseded are never chosen; but for the last two they do
    not count towards ``max_to_keep`` either. With ``keep_every_steps`` multiples of it stay and do not count. With
    ``keep_every_hours``, what is so many hours younger than the last one preserved is preserved, not deleted; before
    the first, than ``hours_from`` (seconds since the epoch; None: the first is preserved in any case). That is the
    rule of `tf.train.CheckpointManager`. With ``hours_grid`` (seconds since the epoch) it is that of `tf.train.Saver`:
    so many hours after that time, then after twice as many, and so on, the next that would be deleted is preserved.
    """
    if max_to_keep is None:
        return Retired([], [])
    newest = next((c for c in reversed(live) if not c.foreign and not c.superseded), None)
    ours = [c for c in live if not c.foreign and c.generation >= first_generation]
    pool = [c for c in ours if not c.preserved and not _is_multiple(c, keep_every_steps)]
    ranked = sorted(pool, key=lambda c: not c.superseded)
    free = [c for c in ranked if c is not newest and c.prefix not in protected]
    retired = Retired([], [])
    kept = [c.time for c in ours if c.preserved]
    for c in free[: max(len(pool) - max_to_keep, 0)]:
        if keep_every_hours is None or c.superseded:
            preserved = False
        elif hours_grid is None:
            preserved = c.time >= max(kept, default=_or_ever(hours_from)) + keep_every_hours * 3600
        else:
            preserved = c.time > _next_on_grid(kept, hours_grid, keep_every_hours)
        if preserved:
            retired.preserved.append(c)
            kept.append(c.time)
        else:
            retired.deleted.append(c)
    return retired


def _or_ever(time: float | None) -> float:
    return float("-inf") if time is None else time


def _next_on_grid(kept: Sequence[float], origin: float, hours: float) -> float:
    """Each one kept takes the grid one step on, however late it was; what an earlier Saver kept lies before it."""
    return origin + (sum(time > origin for time in kept) + 1) * hours * 3600


def _is_multiple(checkpoint: Checkpoint, steps: int | None) -> bool:
    return steps is not None and checkpoint.step % steps == 0 and not checkpoint.superseded
