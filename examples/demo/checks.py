"""What the demo claims, checked on what its processes recorded: functions of their arguments alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.demo.journal import Story
from ray_ckpt.timeline import Timeline

# Sums in another order, over 3 hosts instead of 4, round differently.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One claim, whether it holds, and the numbers."""

    claim: str
    ok: bool
    detail: str


def snapshot_steps(stories: Sequence[Story]) -> set[int]:
    """The steps at which any process of a start took a snapshot."""
    return {event.step for story in stories for event in story.steps if event.saved}


def same_restore(stories: Sequence[Story], newest: int) -> Check:
    """All ranks came back to the newest committed step."""
    found = {story.restored.step if story.restored else None for story in stories}
    shown = ", ".join(map(str, sorted(found, key=str)))
    return Check("all hosts restore the newest checkpoint", found == {newest}, f"newest {newest}, restored {shown}")


def same_eval_loss(before: Sequence[Story], after: Sequence[Story]) -> Check:
    """The restored state has the loss on the fixed batch that was recorded when the state was first there."""
    claim = "the restored model is the saved one (loss on a fixed batch)"
    restored = after[0].restored
    recorded = {event.step: event.eval_loss for story in before for event in story.steps}
    if restored is None or restored.step not in recorded:
        return Check(claim, False, f"step {restored and restored.step} was not recorded before the kill")
    was, now = recorded[restored.step], restored.eval_loss
    ok = math.isclose(was, now, rel_tol=TOLERANCE)
    return Check(claim, ok, f"step {restored.step}: {was:.6f} on {len(before)} hosts, {now:.6f} on {len(after)}")


def loss_goes_on(before: Sequence[Story], after: Sequence[Story]) -> Check:
    """A step trained both before the kill and after the restore has the same loss; it ends lower than it began."""
    first = {event.step: event.loss for event in before[0].steps}
    second = {event.step: event.loss for event in after[0].steps}
    claim = "training goes on where it was"
    if not first or not second:
        return Check(claim, False, "no steps were recorded")
    common = sorted(first.keys() & second.keys())
    # Rounding grows from step to step, so only the first of them says something about the restore.
    same = all(math.isclose(first[step], second[step], rel_tol=10 * TOLERANCE) for step in common[:1])
    start, end = first[min(first)], second[max(second)]
    repeated = "".join(f"step {s} again: {first[s]:.4f} then, {second[s]:.4f} now; " for s in common[:1])
    return Check(claim, same and end < start, f"{repeated}loss {start:.3f} at the start, {end:.3f} at the end")


def save_survived(save: Timeline | None, step: int, killed_at: float) -> Check:
    """The save that was under way at the kill was committed although one of its processes was dead."""
    claim = "the save under way survives the kill"
    if save is None:
        return Check(claim, False, f"step {step} was not committed")
    late = sum(shard.ended > killed_at for shard in save.shards)
    after = save.committed - killed_at
    detail = f"step {step} committed {after:.2f} s after the kill, {late} of {len(save.shards)} shards written after it"
    return Check(claim, after > 0, detail)


def same_digests(trained: Mapping[str, str], read: Mapping[str, str]) -> Check:
    """What TensorFlow read is what was trained, bit for bit."""
    differing = sorted(name for name in trained.keys() | read.keys() if trained.get(name) != read.get(name))
    detail = f"differ: {', '.join(differing)}" if differing else f"SHA-256 of {len(trained)} tensors"
    return Check("TensorFlow reads what was trained, bit for bit", bool(trained) and not differing, detail)
