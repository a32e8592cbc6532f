"""Snapshots of a state in the memory of hosts, as agents hold them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_ckpt import PerWorker, Slice
from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.plan import make_plan
from ray_ckpt.restore import MappedSource, Part, StoredCheckpoint, open_snapshot
from ray_ckpt.snapshot import SaveId, Segment, needed_nbytes, take_snapshot

SAVE = (2, 5)
BIG = (3, 1 << 20)


def states(world: int) -> list[dict[str, Any]]:
    """One for each rank: a replica, parts of a large array, small values and strings."""
    whole = np.arange(world * BIG[0] * BIG[1], dtype=np.float32).reshape(world * BIG[0], BIG[1])
    return [
        {
            "big": Slice(whole[BIG[0] * rank : BIG[0] * (rank + 1)], whole.shape, (BIG[0] * rank, 0)),
            "replica": np.arange(3_000_000, dtype=np.int32),
            "mine": PerWorker(np.array([rank], np.uint8), on_resize="first"),
            "name": "a name",
            "step": SAVE[1],
        }
        for rank in range(world)
    ]


def remember(memories: Sequence[HostMemory], world: int, step: int = SAVE[1], *, keep: bool = False) -> None:
    """Rank i's snapshot in memory i, modulo their number."""
    found = [layout_of(state, rank, world) for rank, state in enumerate(states(world))]
    plan = make_plan([layout for layout, _ in found])
    for rank, (layout, values) in enumerate(found):
        memory, mine = memories[rank % len(memories)], plan.ranks[rank]
        path = memory.prepare(rank, needed_nbytes(mine, layout, values), 1)[0]
        save = SaveId(
            "run", SAVE[0], step, rank, world, plan.plan_id, "memory" if keep else "cadence",
            layout.fingerprint, len(mine.writers), mine.writer_base, mine.num_writers,
        )  # fmt: skip
        memory.keep_layout(layout)
        with Segment.open(path, writable=True) as segment:
            take_snapshot(segment, mine, layout, values, save, keep=keep)


def parts_of(memories: Sequence[HostMemory], save: tuple[int, int] = SAVE) -> list[Part]:
    """What the memories hold of a save, by rank."""
    return sorted((part for memory in memories for part in memory.parts(save, "")), key=lambda part: part.rank)


def opened(parts: Sequence[Part]) -> StoredCheckpoint:
    """The snapshot as a checkpoint; all of it lies on this host."""
    return open_snapshot("the memory of a test", parts, [MappedSource(part.path, part.fills) for part in parts])


def folder(base: Path, name: str) -> Path:
    """A host's folder of the run, private as the agent makes it."""
    made = base / name
    made.mkdir(mode=0o700, exist_ok=True)
    return made
