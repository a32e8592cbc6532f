"""One data shard: a range of a sealed segment -> storage, with the checksums of everything in it.

A function of its arguments alone, so that a Ray task, an agent or a test can run it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from ray_ckpt.bundle import combine, crc32c, encode_piece, encode_run, piece_key, shard_name
from ray_ckpt.errors import SaveError, StorageError
from ray_ckpt.snapshot import WHOLE, Entry, Segment, Table
from ray_ckpt.storage import Store
from ray_ckpt.types import CHUNK_NBYTES, ShardReport


def write_shard(
    segment_path: str | Path,
    *,
    generation: int,
    step: int,
    plan_id: str,
    writer: int,
    store: Store,
    prefix: str,
    shard_id: int,
    num_shards: int,
    attempt: str,
    attempt_try: int,
) -> ShardReport:
    """Stream the range of the segment's writer number ``writer`` (from 0 on each rank) to one data shard.

    ``prefix`` is relative to the store. The report's ``writer`` is the one of the whole job.

    Raises:
        SaveError: the segment does not hold the sealed snapshot of this save, or stopped doing so meanwhile;
            nothing is visible in the store then.
        StorageError: the segment cannot be opened, or the store failed.
    """
    began, began_wall = time.monotonic(), time.time()
    expected = (generation, step, plan_id)
    with Segment.open(segment_path) as segment:
        fills = segment.fills
        table = segment.table()
        found = (table.save.generation, table.save.step, table.save.plan_id)
        if found != expected or not 0 <= writer < len(table.writers):
            raise SaveError(
                f"{segment_path}: holds generation, step, plan {found} for {len(table.writers)} writers, "
                f"expected {expected} and writer {writer}; the snapshot has been replaced"
            )
        shard = _Shard(segment.data, table, writer, shard_id)
        path = shard_name(prefix, shard_id, num_shards)
        with store.create(path) as target:
            for block in shard.blocks():
                target.write(block)
                # A view left over would keep the segment mapped after it is closed.
                block.release()
            if segment.fills != fills or segment.state not in WHOLE:
                raise SaveError(f"{segment_path}: the snapshot of step {step} was released while it was written")
            with contextlib.suppress(StorageError):
                # For a restore from memory, which does without them as well.
                segment.put_sums(table, writer, shard.crcs, shard.chunks)
    return ShardReport(
        attempt=attempt,
        writer=table.writer_base + writer,
        attempt_try=attempt_try,
        shard_id=shard_id,
        path=path,
        nbytes=shard.nbytes,
        run=encode_run(sorted(shard.pairs)),
        chunks=struct.pack(f"<{len(shard.chunks)}I", *shard.chunks),
        seconds_s=time.monotonic() - began,
        host=socket.gethostname(),
        began=began_wall,
    )


def sum_up(segment: Segment) -> None:
    """Leave the checksums of all that a sealed segment holds, for those who restore from it.

    Raises:
        SaveError, DamagedError: it holds no snapshot.
        StorageError: no space for them.
    """
    table = segment.table()
    for writer, (first, stop) in enumerate(table.writers):
        if first < stop:
            shard = _Shard(segment.data, table, writer, 0)
            for block in shard.blocks():
                block.release()
            segment.put_sums(table, writer, shard.crcs, shard.chunks)


class _Shard:
    """The bytes of one writer, and what its index says of them once they have all been read."""

    def __init__(self, data: memoryview, table: Table, writer: int, shard_id: int) -> None:
        first, stop = table.writers[writer]
        self.entries = table.entries[first:stop]
        self.start = self.entries[0].start
        self.nbytes = self.entries[-1].start + self.entries[-1].nbytes - self.start
        self.pairs: list[tuple[bytes, bytes]] = []
        self.crcs: list[int] = []
        self.chunks: list[int] = []
        self._data = data
        self._shard_id = shard_id

    def blocks(self) -> Iterator[memoryview]:
        """All bytes in order, in views of one chunk, so that they stay on pages; the last may be shorter."""
        start = self.start
        for entry in self.entries:
            for stop in self._checksum(entry):
                while stop - start >= CHUNK_NBYTES:
                    yield self._data[start : start + CHUNK_NBYTES]
                    start += CHUNK_NBYTES
        if start < self.start + self.nbytes:
            yield self._data[start : self.start + self.nbytes]

    def _checksum(self, entry: Entry) -> Iterator[int]:
        """Where each chunk of an entry ends, its checksum being known; adds the entry to the index."""
        end = entry.start + entry.nbytes
        if entry.nbytes <= CHUNK_NBYTES:
            total = self._crc(entry.start, end)
            yield end
        else:
            total = 0
            for start in range(entry.start, end, CHUNK_NBYTES):
                stop = min(start + CHUNK_NBYTES, end)
                crc = self._crc(start, stop)
                total = combine(total, crc, stop - start)
                self.chunks.append(crc)
                yield stop
        crc = total if entry.crc is None else entry.crc
        self.crcs.append(crc)
        value = encode_piece(entry.dtype, entry.box.shape, self._shard_id, entry.start - self.start, entry.nbytes, crc)
        self.pairs.append((piece_key(entry.name, entry.box, entry.shape), value))

    def _crc(self, start: int, stop: int) -> int:
        # A view left over would keep the segment mapped after it is closed.
        with self._data[start:stop] as part:
            return crc32c(part)
