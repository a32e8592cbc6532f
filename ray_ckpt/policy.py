"""When to save and what to keep: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

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


def victims(
    live: Sequence[Checkpoint],
    *,
    max_to_keep: int | None,
    keep_every_steps: int | None = None,
    keep_every_hours: float | None = None,
    protected: frozenset[str] = frozenset(),
) -> list[Checkpoint]:
    """The checkpoints to delete, superseded ones first, then the oldest.

    ``live`` is in commit order. Foreign ones, those in ``protected`` (prefixes) and the newest that is
    not superseded are never chosen. With ``keep_every_steps`` multiples of it stay for good, with
    ``keep_every_hours`` the first of each such span of time; neither counts towards ``max_to_keep``.
    """
    if max_to_keep is None:
        return []
    candidates = [c for c in live if not c.foreign]
    kept_for_good = _milestones(candidates, keep_every_steps, keep_every_hours)
    newest = next((c for c in reversed(candidates) if not c.superseded), None)
    pool = [c for c in candidates if c.prefix not in kept_for_good]
    excess = len(pool) - max_to_keep
    ranked = sorted(pool, key=lambda c: not c.superseded)
    free = [c for c in ranked if c is not newest and c.prefix not in protected]
    return free[: max(excess, 0)]


def _milestones(candidates: Sequence[Checkpoint], steps: int | None, hours: float | None) -> frozenset[str]:
    kept = {c.prefix for c in candidates if steps and c.step % steps == 0 and not c.superseded}
    if hours:
        last_kept = float("-inf")
        for c in candidates:
            if not c.superseded and c.time >= last_kept + hours * 3600:
                kept.add(c.prefix)
                last_kept = c.time
    return frozenset(kept)
