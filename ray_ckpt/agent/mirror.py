"""Copies of other hosts' snapshots: pulled from their agents in verified chunks, bounded in memory and rate.

See docs/design/0004-memory-tiers.md, "Replicas".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.bundle import crc32c
from ray_ckpt.errors import DamagedError, ObjectMissingError
from ray_ckpt.restore import Part
from ray_ckpt.snapshot import decode_table
from ray_ckpt.types import Layout
from ray_ckpt.writer import sum_up

CHUNK_NBYTES = 8 << 20
_UNDER_WAY = 2

Piece = tuple[Any, int] | None
"""Bytes of another host's snapshot and their crc32c; None where it is gone."""

Ask = Callable[[Part, int, int], Callable[[], Piece]]
"""Begin to read bytes of a part, from a start on; what is given waits for them."""


def mirror(memory: HostMemory, part: Part, layout: Layout, ask: Ask, bytes_per_s: float | None) -> None:
    """Copy one rank's snapshot of another host into this one's memory. Blocks.

    Raises:
        ObjectMissingError: the snapshot is gone.
        DamagedError: bytes arrived that are not what was sent.
        StorageError: there is no room here.
    """
    table = decode_table(part.table)
    memory.keep_layout(layout)
    segment = memory.room_for_replica(part.rank, part.nbytes)
    with segment.fill(replace(table.save, replica=True)):
        for start, data, crc in _pull(part, ask, bytes_per_s):
            view = segment.data[start : start + len(data)]
            view[:] = data
            # Of what lies here now, so that the copy is verified as well.
            if crc32c(view) != crc:
                raise DamagedError(f"rank {part.rank}'s snapshot of step {table.save.step}: changed on its way here")
        segment.seal(part.table, keep=table.save.trigger == "memory")
    sum_up(segment)


def _pull(part: Part, ask: Ask, bytes_per_s: float | None) -> Iterator[tuple[int, memoryview, int]]:
    """The chunks in order; the next is on its way while one is handled."""
    starts = iter(range(0, part.nbytes, CHUNK_NBYTES))
    open_ = [(start, ask(part, start, _length(part, start))) for start in islice(starts, _UNDER_WAY)]
    began, done = time.monotonic(), 0
    while open_:
        start, wait = open_.pop(0)
        found = wait()
        if found is None:
            raise ObjectMissingError(f"{part.path}: the snapshot of rank {part.rank} is gone")
        following = next(starts, None)
        if following is not None:
            open_.append((following, ask(part, following, _length(part, following))))
        yield start, memoryview(found[0]), found[1]
        done += _length(part, start)
        if bytes_per_s is not None:
            time.sleep(max(0.0, began + done / bytes_per_s - time.monotonic()))


def _length(part: Part, start: int) -> int:
    return min(CHUNK_NBYTES, part.nbytes - start)


def read_piece(memory: HostMemory, path: str, fills: int, start: int, nbytes: int) -> Piece:
    """The other side: bytes of a snapshot in this host's memory."""
    data = memory.read(path, fills, start, nbytes)
    # As an array: Ray hands that on without copying it.
    return None if data is None else (np.frombuffer(data, np.uint8), crc32c(data))
