"""From wanted boxes to the stored pieces that hold them: what is to be read, once each, and where it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ray_ckpt.bundle import (
    Piece,
    StoredTensor,
    content_crc,
    crc32c,
    decode_objects,
    dtype_of,
    nbytes_of,
)
from ray_ckpt.errors import DamagedError, MismatchError
from ray_ckpt.plan import PieceIndex
from ray_ckpt.restore.collector import collector_paused
from ray_ckpt.restore.region import Array, cut
from ray_ckpt.restore.stored import StoredCheckpoint
from ray_ckpt.types import Box, Shape

PACKED_NBYTES = 1 << 20
"""Up to this size, pieces are read together with their neighbours."""

Wanted = tuple[str, Box, Array]
"""Name of a tensor, a box in it, and the array of that shape to fill."""


class Target(NamedTuple):
    """A region of one piece, in the piece's own coordinates, and the array view it goes to."""

    region: Box
    out: Array


@dataclass(slots=True, eq=False)
class PieceJob:
    """One stored piece that is to be read and verified, and all who want a part of it."""

    name: str
    dtype: str
    piece: Piece
    targets: list[Target] = field(default_factory=list)

    @property
    def is_numeric(self) -> bool:
        """True where the bytes are the elements themselves, so that a part of them makes sense alone."""
        return nbytes_of(self.dtype, 1) is not None

    def finish(self, raw: memoryview) -> None:
        """Verify the whole piece's bytes and hand them out.

        Raises:
            DamagedError: the checksum differs; the caller adds the file's name.
        """
        if self.piece.crc is None:
            pass
        elif self.is_numeric:
            self.check(crc32c(raw))
        else:
            self.check(content_crc(self.dtype, self.piece.box.size, bytes(raw)))
        if self.targets:
            shape = self.piece.box.shape
            whole = self._decode(raw).reshape(shape)
            for region, out in self.targets:
                out[...] = whole if region.shape == shape else cut(whole, region)

    def check(self, found: int) -> None:
        """Raise `DamagedError` unless ``found`` is the piece's crc32c, if that is known."""
        if self.piece.crc not in (None, found):
            raise DamagedError(f"crc32c {found:08x}, should be {self.piece.crc:08x}")

    def _decode(self, raw: memoryview) -> Array:
        if self.is_numeric:
            return np.frombuffer(raw, dtype_of(self.dtype))
        count = self.piece.box.size
        objects = np.empty(count, object)
        objects[:] = decode_objects(self.dtype, bytes(raw), count)
        return objects


def lent(stored: StoredCheckpoint, name: str, box: Box) -> Array | None:
    """An array that holds this box already, without a copy; None where there is none, so that it must be read.

    It is verified by reading the box into it, as into any other. Writing to it changes nothing but itself.
    """
    tensor = stored.tensor(name)
    dtype = dtype_of(tensor.dtype)
    nbytes = box.size * dtype.itemsize
    if dtype.hasobject or nbytes <= PACKED_NBYTES:
        return None
    piece = next((piece for piece in tensor.pieces if piece.box == box), None)
    if piece is None or piece.nbytes != nbytes or piece.offset % dtype.alignment:
        return None
    raw = stored.store.lend(stored.shard_path(piece.shard_id), piece.offset, nbytes)
    if raw is None:
        return None
    array: Array = np.frombuffer(raw, dtype).reshape(box.shape)
    return array


@collector_paused()
def wanted_jobs(stored: StoredCheckpoint, wanted: Iterable[Wanted]) -> list[PieceJob]:
    """One job for each stored piece that holds a part of what is wanted.

    Raises:
        UsageError: no such tensor.
        MismatchError: a box is not inside its tensor, or an array has another shape or dtype.
    """
    jobs: dict[tuple[str, int], PieceJob] = {}
    indexes: dict[str, PieceIndex] = {}
    for name, box, out in wanted:
        tensor = stored.tensor(name)
        _check_wanted(stored, tensor, box, out)
        if not out.size:
            continue
        for number, common in _pieces(tensor, box, indexes):
            job = jobs.get((name, number))
            if job is None:
                job = jobs[name, number] = PieceJob(name, tensor.dtype, tensor.pieces[number])
            view = out if common is box else cut(out, common.relative_to(box))
            held = job.piece.box
            job.targets.append(Target(common.relative_to(held) if any(held.offset) else common, view))
    return list(jobs.values())


def _pieces(tensor: StoredTensor, box: Box, indexes: dict[str, PieceIndex]) -> Iterable[tuple[int, Box]]:
    """Numbers of the pieces that share elements with a box that has any, and the shared boxes."""
    if len(tensor.pieces) == 1:
        return ((0, box),)
    index = indexes.get(tensor.name)
    if index is None:
        index = indexes[tensor.name] = PieceIndex([piece.box for piece in tensor.pieces], tensor.name)
    return index.intersections(box)


def _check_wanted(stored: StoredCheckpoint, tensor: StoredTensor, box: Box, out: Array) -> None:
    dtype = dtype_of(tensor.dtype)
    if out.dtype != dtype or out.shape != box.shape or not out.flags.writeable:
        raise MismatchError(
            f"{stored.where}: tensor {tensor.name!r} is {dtype.name}; to read a box {box.shape} of it,"
            f" pass a writeable {dtype.name} array of that shape, found a"
            f"{'' if out.flags.writeable else ' read-only'} {out.dtype.name} array of shape {out.shape}"
        )
    if not _is_inside(box, tensor.shape):
        raise MismatchError(
            f"{stored.where}: tensor {tensor.name!r} has shape {tensor.shape}, the box at {box.offset} of"
            f" shape {box.shape} is not inside it; compare with `ray-ckpt show`"
        )


def _is_inside(box: Box, shape: Shape) -> bool:
    """Whether an array of this shape has all of the box, whose own shape is known to be one."""
    if len(box.offset) != len(shape):
        return False
    if box.shape == shape and not any(box.offset):
        return True
    return all(o >= 0 and o + n <= d for o, n, d in zip(box.offset, box.shape, shape, strict=True))
