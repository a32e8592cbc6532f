"""A snapshot in host memory as a checkpoint: an index made of its tables, data shards that are its segments.

So one engine plans, reads, verifies and reshards, wherever the bytes come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_ckpt.bundle import Index, Piece, StoredTensor, first_fault, shard_name
from ray_ckpt.errors import DamagedError, ObjectMissingError
from ray_ckpt.metadata import Metadata, RankTree
from ray_ckpt.restore.collector import collector_paused
from ray_ckpt.restore.stored import StoredCheckpoint
from ray_ckpt.snapshot import WHOLE, Entry, Segment, Sums, Table, chunks_in, decode_table
from ray_ckpt.storage import Reader
from ray_ckpt.types import Box, Shape

_CRC_NBYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """What a host tells of one rank's segment; the data is read later.

    ``fills`` tells whether it still holds the same. ``table`` is encoded; ``tree`` and ``kinds`` are of the rank's
    `types.Layout` (kinds by leaf name, where they are not the default).
    """

    rank: int
    path: str
    fills: int
    nbytes: int
    table: bytes
    sums: Sums
    tree: str
    kinds: Mapping[str, str]


class Source(ABC):
    """The bytes of one segment, wherever it lies. May be called from any thread."""

    @abstractmethod
    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the data from ``start`` on. Raises `ObjectMissingError` if it is gone."""

    def lend(self, start: int, nbytes: int) -> memoryview | None:  # noqa: ARG002
        """See `Reader.lend`."""
        return None

    def close(self) -> None:  # noqa: B027, optional
        """Nothing more is read."""


class MappedSource(Source):
    """A segment of this host. ``lends``: its memory may become that of restored arrays."""

    def __init__(self, path: str | Path, fills: int, *, lends: bool = True) -> None:
        self._segment = Segment.open(path, writable=True)
        self._fills = fills
        self._lends = lends
        self._own: memoryview | None = None
        self._lent: set[int] = set()

    def lend(self, start: int, nbytes: int) -> memoryview | None:
        # Not twice: two arrays in the same memory would change with each other.
        if not self._lends or start in self._lent:
            return None
        if self._own is None:
            self._own = self._segment.lend(self._fills)
        if self._own is None:
            return None
        self._lent.add(start)
        return self._own[start : start + nbytes]

    def read_into(self, start: int, buffer: memoryview) -> None:
        segment = self._segment
        if not self._is_lent(start, buffer):
            buffer[:] = segment.data[start : start + len(buffer)]
        # After the copy: somebody who had begun to fill it again would have changed this before the data. What is lent
        # stays as it is.
        if self._own is None and (segment.fills != self._fills or segment.state not in WHOLE):
            raise ObjectMissingError(f"{segment.path}: the snapshot was overwritten while it was read")

    def _is_lent(self, start: int, buffer: memoryview) -> bool:
        """Whether the buffer is where these bytes lie already."""
        return self._own is not None and _address(buffer) == _address(self._own) + start

    def close(self) -> None:
        """Let go of the segment: while it is open nobody gives its memory back. What is lent stays."""
        self._own = None
        self._segment.close()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


class SnapshotReader(Reader):
    """The segments of one snapshot, by the name of the data shard that each stands for."""

    def __init__(self, url: str, sources: Mapping[str, tuple[Source, int]]) -> None:
        self.url = url
        self._sources = sources

    def read_into(self, path: str, start: int, buffer: memoryview) -> None:
        source, nbytes = self._source(path)
        if start + len(buffer) > nbytes:
            raise DamagedError(f"{path!r} in {self.url} has {nbytes} bytes, expected {start + len(buffer)}")
        source.read_into(start, buffer)

    def lend(self, path: str, start: int, nbytes: int) -> memoryview | None:
        source, held = self._source(path)
        return source.lend(start, nbytes) if start + nbytes <= held else None

    def size(self, path: str) -> int:
        return self._source(path)[1]

    def read(self, path: str) -> bytes:
        return self.read_range(path, 0, self.size(path))

    def _source(self, path: str) -> tuple[Source, int]:
        found = self._sources.get(path)
        if found is None:
            raise ObjectMissingError(f"{self.url} has no {path!r}")
        return found


def open_snapshot(url: str, parts: Sequence[Part], sources: Sequence[Source]) -> StoredCheckpoint:
    """The snapshot whose parts these are, one of each rank in order, with the source of each one's bytes.

    Raises:
        DamagedError: they do not belong together, or do not hold each element once.
    """
    tables = [decode_table(part.table) for part in parts]
    save = tables[0].save
    found = [(t.save.directory, t.save.generation, t.save.step, t.save.plan_id, t.save.rank) for t in tables]
    expected = [(save.directory, save.generation, save.step, save.plan_id, rank) for rank in range(save.world_size)]
    if found != expected:
        raise DamagedError(f"{url}: the parts are of {found}, expected {expected}; restore another checkpoint")
    prefix = f"step-{save.step}"
    count = len(parts)
    shards = {shard_name(prefix, rank, count): (source, parts[rank].nbytes) for rank, source in enumerate(sources)}
    index, chunks = _index(url, tables, [part.sums for part in parts])
    return StoredCheckpoint(SnapshotReader(url, shards), prefix, index, _metadata(parts, tables[0]), chunks)


@collector_paused()
def _index(url: str, tables: Sequence[Table], sums: Sequence[Sums]) -> tuple[Index, dict[tuple[int, int], memoryview]]:
    """What lies where, and the checksums of chunks. The shard of a rank has the rank's number."""
    forms: dict[str, tuple[str, Shape]] = {}
    pieces: dict[str, list[Piece]] = {}
    chunks: dict[tuple[int, int], memoryview] = {}
    for rank, (table, known) in enumerate(zip(tables, sums, strict=True)):
        for entry, crc, crcs in _summed(table, known):
            form = forms.setdefault(entry.name, (entry.dtype, entry.shape))
            if form != (entry.dtype, entry.shape):
                raise DamagedError(
                    f"{url}: {entry.name!r} is {form} on one rank and {entry.dtype, entry.shape} on another"
                )
            pieces.setdefault(entry.name, []).append(Piece(entry.box, rank, entry.start, entry.nbytes, crc))
            if crcs is not None:
                chunks[rank, entry.start] = crcs
    tensors = {}
    for name in sorted(pieces):
        dtype, shape = forms[name]
        held = pieces[name]
        if not (len(held) == 1 and held[0].box == Box.whole(shape)):
            fault = first_fault(shape, [piece.box for piece in held])
            if fault is not None:
                raise DamagedError(f"{url}: element {fault[0]} of {name!r} is in {fault[1]} of its slices")
        tensors[name] = StoredTensor(name, dtype, shape, tuple(held))
    return Index(len(tables), tensors), chunks


def _summed(table: Table, sums: Sums) -> list[tuple[Entry, int | None, memoryview | None]]:
    """Each entry, its checksum and those of its chunks, where they are known."""
    count = len(table.entries) + sum(chunks_in(entry.nbytes) for entry in table.entries)
    raw = memoryview(sums.data[: _CRC_NBYTES * count].ljust(_CRC_NBYTES * count, b"\0"))
    crcs = raw.cast("I")
    found: list[tuple[Entry, int | None, memoryview | None]] = []
    chunk = len(table.entries)
    for (first, stop), known in zip(table.writers, sums.known, strict=False):
        for number in range(first, stop):
            entry = table.entries[number]
            count = chunks_in(entry.nbytes)
            part = raw[_CRC_NBYTES * chunk : _CRC_NBYTES * (chunk + count)] if known and count else None
            found.append((entry, crcs[number] if known else entry.crc, part))
            chunk += count
    return found


def _metadata(parts: Sequence[Part], table: Table) -> Metadata:
    ranks: dict[str, list[int]] = {}
    kinds: dict[str, str] = {}
    for part in parts:
        ranks.setdefault(part.tree, []).append(part.rank)
        kinds.update(part.kinds)
    save = table.save
    trees = tuple(RankTree(tuple(of), tree) for tree, of in ranks.items())
    return Metadata(save.step, "", save.generation, save.world_size, save.due, trees=trees, kinds=kinds)
