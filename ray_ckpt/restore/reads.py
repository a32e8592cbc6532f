"""The reads that fetch a set of pieces: small neighbours together, large ones in ranges, right into place.

A piece is verified by its own crc32c wherever all of it is read: the ranges' checksums are combined. Where
the checkpoint has checksums of a large piece's chunks, only those chunks that are wanted are read, each
verified alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ray_ckpt.bundle import combine, crc32c, dtype_of
from ray_ckpt.errors import DamagedError
from ray_ckpt.restore.collector import collector_paused
from ray_ckpt.restore.jobs import PACKED_NBYTES, PieceJob, Target
from ray_ckpt.restore.region import Array, scatter, span, spans
from ray_ckpt.restore.stored import StoredCheckpoint, chunk_crc
from ray_ckpt.types import CHUNK_NBYTES

_GAP_NBYTES = 64 << 10
"""Reading so many unwanted bytes costs less than another request."""


@dataclass(frozen=True, slots=True)
class PackRead:
    """One ranged read that holds one or more whole pieces of one data shard."""

    shard_id: int
    start: int
    stop: int
    jobs: Sequence[PieceJob]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Bytes of memory this takes beside the targets: the buffer, and the storage library's own."""
        return 2 * self.nbytes

    def run(self, stored: StoredCheckpoint) -> list[tuple[PieceJob, DamagedError]]:
        """Read, verify and hand out; gives back the damaged pieces."""
        raw = np.empty(self.nbytes, np.uint8).data
        stored.store.read_into(stored.shard_path(self.shard_id), self.start, raw)
        damaged = []
        for job in self.jobs:
            at = job.piece.offset - self.start
            try:
                job.finish(raw[at : at + job.piece.nbytes])
            except DamagedError as error:
                damaged.append((job, error))
        return damaged


@dataclass(slots=True)
class Whole:
    """Collects the checksums of the ranges of one piece; the last one in decides."""

    job: PieceJob
    missing: int = 0
    crcs: dict[int, tuple[int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, start: int, nbytes: int, crc: int) -> None:
        """One range is there. Raises `DamagedError` if it is the last one and the whole's crc32c differs."""
        with self.lock:
            self.crcs[start] = crc, nbytes
            last = len(self.crcs) == self.missing
        if last:
            total = 0
            for _, (part, length) in sorted(self.crcs.items()):
                total = combine(total, part, length)
            self.job.check(total)


@dataclass(frozen=True, slots=True)
class RangeRead:
    """Bytes start <= i < stop of one large piece of numbers.

    ``whole`` collects the checksums if all of the piece is read; else ``chunks`` are those of its chunks, and
    the range begins and ends where chunks do. Neither: nothing is known to verify it by.
    """

    job: PieceJob
    start: int
    stop: int
    whole: Whole | None
    chunks: memoryview | None

    @property
    def shard_id(self) -> int:
        """The data shard that is read."""
        return self.job.piece.shard_id

    @property
    def jobs(self) -> Sequence[PieceJob]:
        """The piece, as `PackRead` has its pieces."""
        return (self.job,)

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Bytes of memory this takes beside the targets: the buffer, and the storage library's own."""
        return self.nbytes if self._direct() else 2 * self.nbytes

    def run(self, stored: StoredCheckpoint) -> list[tuple[PieceJob, DamagedError]]:
        """Read, hand out and verify, as `PackRead.run` does."""
        direct = self._direct()
        raw = np.empty(self.nbytes, np.uint8) if direct is None else direct[1]
        view = raw.data
        path = stored.shard_path(self.shard_id)
        stored.store.read_into(path, self.job.piece.offset + self.start, view)
        for target in self.job.targets:
            if direct is None or target is not direct[0]:
                self._scatter(raw, target)
        try:
            self._verify(view)
        except DamagedError as error:
            return [(self.job, error)]
        return []

    def _verify(self, view: memoryview) -> None:
        if self.whole is not None:
            self.whole.add(self.start, self.nbytes, crc32c(view))
            return
        if self.chunks is None:
            return
        for at in range(0, self.nbytes, CHUNK_NBYTES):
            chunk = (self.start + at) // CHUNK_NBYTES
            found, expected = crc32c(view[at : at + CHUNK_NBYTES]), chunk_crc(self.chunks, chunk)
            if found != expected:
                raise DamagedError(f"crc32c {found:08x} of its 4 MiB chunk {chunk}, should be {expected:08x}")

    def _scatter(self, raw: Array, target: Target) -> None:
        flat = raw.view(dtype_of(self.job.dtype))
        start = self.start // flat.itemsize
        scatter(flat, start, self.job.piece.box.shape, target.region, target.out)

    def _direct(self) -> tuple[Target, Array] | None:
        """A target whose memory can take this range as it is, and that memory as bytes."""
        for target in self.job.targets:
            run = unbroken(self.job, target)
            if run is not None and run[0] <= self.start and self.stop <= run[1]:
                flat = target.out.reshape(-1).view(np.uint8)
                return target, flat[self.start - run[0] : self.stop - run[0]]
        return None


Read = PackRead | RangeRead


def unbroken(job: PieceJob, target: Target) -> tuple[int, int] | None:
    """The bytes of the piece that a target takes, if they are contiguous both there and in memory."""
    first, stop = span(target.region, job.piece.box.shape)
    if stop - first != target.region.size or not target.out.flags.c_contiguous:
        return None
    return first * target.out.itemsize, stop * target.out.itemsize


@collector_paused()
def plan_reads(stored: StoredCheckpoint, jobs: Iterable[PieceJob], read_nbytes: int) -> list[Read]:
    """The reads for these pieces, in the order of the files; none above ``read_nbytes`` but one large string.

    ``read_nbytes`` is a multiple of `CHUNK_NBYTES`.

    Raises:
        DamagedError: a piece of no bytes has a checksum of some.
    """
    reads: list[Read] = []
    packed: list[PieceJob] = []
    for job in jobs:
        if job.piece.nbytes <= PACKED_NBYTES or not job.is_numeric:
            packed.append(job)
        else:
            reads += _ranges(stored, job, read_nbytes)
    reads += _packs(packed, read_nbytes)
    reads.sort(key=_position)
    return reads


def _position(read: Read) -> tuple[int, int]:
    start = read.start if isinstance(read, PackRead) else read.job.piece.offset + read.start
    return read.shard_id, start


def _packs(jobs: list[PieceJob], read_nbytes: int) -> Iterator[PackRead]:
    jobs.sort(key=lambda job: (job.piece.shard_id, job.piece.offset))
    group: list[PieceJob] = []
    shard_id = start = stop = 0
    for job in jobs:
        piece = job.piece
        end = max(stop, piece.offset + piece.nbytes)
        near = piece.shard_id == shard_id and piece.offset - stop <= _GAP_NBYTES and end - start <= read_nbytes
        if group and not near:
            yield PackRead(shard_id, start, stop, group)
            group = []
        if not group:
            shard_id, start, end = piece.shard_id, piece.offset, piece.offset + piece.nbytes
        group.append(job)
        stop = end
    if group:
        yield PackRead(shard_id, start, stop, group)


def _ranges(stored: StoredCheckpoint, job: PieceJob, read_nbytes: int) -> list[RangeRead]:
    piece = job.piece
    chunks = stored.chunk_crcs.get((piece.shard_id, piece.offset))
    known = piece.crc is not None
    extents = [(0, piece.nbytes)] if (known and chunks is None) or not job.targets else _wanted_chunks(job)
    if known and extents == [(0, piece.nbytes)]:
        whole, chunks = Whole(job), None
    else:
        whole = None
    runs = [run for target in job.targets if (run := unbroken(job, target)) is not None]
    grain = 1 if whole else CHUNK_NBYTES
    # Cut where a target's contiguous run begins and ends, so that what lies inside it needs no buffer.
    edges = {-(-first // grain) * grain for first, _ in runs} | {stop // grain * grain for _, stop in runs}
    reads = [
        RangeRead(job, start, stop, whole, chunks)
        for first, last in extents
        for start, stop in pairwise(_cuts(first, last, edges, read_nbytes))
    ]
    if whole:
        whole.missing = len(reads)
    return reads


def _cuts(first: int, last: int, edges: set[int], read_nbytes: int) -> list[int]:
    """Where to cut first..last: at the edges, and so that no part is larger than ``read_nbytes``."""
    bounds = sorted({first, last, *(edge for edge in edges if first < edge < last)})
    cuts = [bounds[0]]
    for start, stop in pairwise(bounds):
        cuts += range(start + read_nbytes, stop, read_nbytes)
        cuts.append(stop)
    return cuts


def _wanted_chunks(job: PieceJob) -> list[tuple[int, int]]:
    """Ascending, disjoint byte ranges of whole chunks that hold all that the targets want."""
    itemsize = dtype_of(job.dtype).itemsize
    shape, nbytes = job.piece.box.shape, job.piece.nbytes
    chunks: set[int] = set()
    for target in job.targets:
        for first, stop in spans(target.region, shape, CHUNK_NBYTES // itemsize):
            chunks.update(range(first * itemsize // CHUNK_NBYTES, (stop * itemsize - 1) // CHUNK_NBYTES + 1))
    extents: list[tuple[int, int]] = []
    for chunk in sorted(chunks):
        start, stop = chunk * CHUNK_NBYTES, min((chunk + 1) * CHUNK_NBYTES, nbytes)
        if extents and extents[-1][1] == start:
            start = extents.pop()[0]
        extents.append((start, stop))
    return extents
