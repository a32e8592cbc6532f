"""Records for tests, and what racing processes do with them."""

from __future__ import annotations

from ray_ckpt.log import append, prune, read_head, repair_state_file
from ray_ckpt.storage import Store
from ray_ckpt.types import Checkpoint, LogRecord


def checkpoint(step: int, *, superseded: bool = False) -> Checkpoint:
    return Checkpoint(
        step=step,
        prefix=f"model.ckpt-{step}",
        attempt=f"e1-{step}",
        generation=1,
        time=1000.0 + step,
        nbytes=10,
        num_shards=1,
        world_size=2,
        superseded=superseded,
    )


def record(sequence: int, *live: Checkpoint, owner: str = "me", epoch: int = 1) -> LogRecord:
    high_water = max((c.step for c in live), default=-1)
    return LogRecord(sequence, "commit", epoch, owner, 5.0, live, (), None, high_water)


def fill(store: Store, first: int, last: int) -> LogRecord:
    """Append records first..last."""
    for sequence in range(first, last + 1):
        won, top = append(store, record(sequence, checkpoint(sequence)))
        assert won
    return top


APPENDS_EACH = 4


def append_some(store: Store, number: int) -> list[int]:
    """A racer that gets `APPENDS_EACH` records in, whatever their number, then repairs and prunes."""
    won_at: list[int] = []
    while len(won_at) < APPENDS_EACH:
        head = read_head(store)
        sequence = head.sequence + 1 if head else 1
        mine = record(sequence, checkpoint(sequence), owner=f"racer {number}")
        won, top = append(store, mine)
        if won:
            won_at.append(sequence)
            repair_state_file(store)
            prune(store, top, keep=32)
        else:
            assert top.sequence >= sequence
    return won_at
