"""Copies of other hosts' snapshots: read from their agents in verified chunks, bounded in memory and rate.

See docs/design/0004-memory-tiers.md, "Replicas".
"""

from __future__ import annotations

import time
from dataclasses import replace

from ray_ckpt.agent.memory import HostMemory
from ray_ckpt.restore import Part, Source
from ray_ckpt.snapshot import decode_table
from ray_ckpt.types import Layout
from ray_ckpt.writer import sum_up

CHUNK_NBYTES = 8 << 20


def mirror(memory: HostMemory, part: Part, layout: Layout, source: Source, bytes_per_s: float | None) -> None:
    """Copy one rank's snapshot of another host into this one's memory. Blocks.

    Raises:
        ObjectMissingError: the snapshot is gone.
        DamagedError: bytes arrived that are not what was sent.
        UnavailableError: the other host does not answer.
        StorageError: there is no room here.
    """
    table = decode_table(part.table)
    nbytes = max((entry.start + entry.nbytes for entry in table.entries), default=0)
    memory.keep_layout(layout)
    segment = memory.room_for_replica(part.rank, nbytes)
    began = time.monotonic()
    with segment.fill(replace(table.save, replica=True)):
        for start in range(0, nbytes, CHUNK_NBYTES):
            stop = min(start + CHUNK_NBYTES, nbytes)
            with segment.data[start:stop] as chunk:
                source.read_into(start, chunk)
            if bytes_per_s is not None:
                time.sleep(max(0.0, began + stop / bytes_per_s - time.monotonic()))
        segment.seal(part.table, keep=table.save.trigger == "memory")
    sum_up(segment)
