"""Reading a checkpoint's ``.index``: which tensors there are, and where their bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.message import DecodeError

from ray_ckpt.bundle.coding import is_slice_key, key_name, slice_key
from ray_ckpt.bundle.cover import countable, first_fault, out_of_bounds
from ray_ckpt.bundle.decode import Entry, EntryDecoder, Piece
from ray_ckpt.bundle.entry import FORMAT_VERSION, FULL, HEADER_KEY
from ray_ckpt.bundle.limits import MAX_PARTITIONED_RANK, describe
from ray_ckpt.bundle.schema import BundleHeaderProto
from ray_ckpt.bundle.table import read_table
from ray_ckpt.errors import DamagedError
from ray_ckpt.types import Box, Shape

_LITTLE_ENDIAN = 0


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint; ``pieces`` hold each of its elements once.

    ``dtype`` is a name of `bundle.dtypes`, or "variant" or "resource".
    """

    name: str
    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """All tensors of one checkpoint, sorted by name."""

    num_shards: int
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def parse(cls, raw: bytes, source: str = "") -> Index:
        """The index in the bytes of an ``.index`` file, whoever wrote it; ``source`` names it in errors.

        Raises:
            DamagedError: not a whole, sound index, or one that a newer TensorFlow wrote.
        """
        try:
            return _parse(raw)
        except (DamagedError, DecodeError) as error:
            where = source or "checkpoint index"
            raise DamagedError(f"{where}: {error}; restore another checkpoint") from None


def _parse(raw: bytes) -> Index:
    pairs = read_table(raw)
    if not pairs or pairs[0][0] != HEADER_KEY:
        raise DamagedError("the index has no header")
    num_shards = _read_header(pairs[0][1])
    decode = EntryDecoder(num_shards).decode
    slices: dict[bytes, Entry] = {}
    tensors: dict[str, StoredTensor] = {}
    # Keys of slices sort before all names, so that the slices are there when their tensor comes.
    for key, value in pairs[1:]:
        try:
            entry = decode(value)
            if is_slice_key(key):
                slices[key] = entry
                continue
            name = _decode_name(key)
            pieces = _read_slices(key, entry, slices) if entry.slices else (entry.piece,)
        except DamagedError as error:
            raise DamagedError(f"{key_name(key)}: {error}") from None
        tensors[name] = StoredTensor(name, entry.form.dtype, entry.form.box.shape, pieces)
    if slices:
        raise DamagedError(f"{key_name(next(iter(slices)))}: a slice that its tensor does not list")
    return Index(num_shards, tensors)


def _read_header(value: bytes) -> int:
    header = BundleHeaderProto.FromString(value)
    if header.num_shards < 1:
        raise DamagedError(f"the header counts {header.num_shards} data shards")
    if header.endianness != _LITTLE_ENDIAN:
        raise DamagedError("written on a big-endian machine, which TensorFlow cannot read here either")
    version = header.version
    if version.min_consumer > FORMAT_VERSION or FORMAT_VERSION in version.bad_consumers:
        raise DamagedError(f"needs bundle format {version.min_consumer}, this is {FORMAT_VERSION}")
    return int(header.num_shards)


def _decode_name(key: bytes) -> str:
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise DamagedError(f"name {key[:80]!r} is not UTF-8") from None


def _read_slices(key: bytes, entry: Entry, slices: dict[bytes, Entry]) -> tuple[Piece, ...]:
    """The pieces of a partitioned tensor; takes them out of ``slices``."""
    shape = entry.form.box.shape
    if len(shape) > MAX_PARTITIONED_RANK:
        raise DamagedError(f"rank {len(shape)} in slices, TensorFlow has at most {MAX_PARTITIONED_RANK}")
    pieces: list[Piece] = []
    for listed in entry.slices:
        extents = [(e.start, e.length if e.HasField("length") else FULL) for e in listed.extent]
        box = _read_box(extents, shape)
        stored = slices.pop(slice_key(key, extents), None)
        if stored is None:
            raise DamagedError(f"slice {describe(box)} is listed but not stored, or listed twice")
        if stored.form.dtype != entry.form.dtype or stored.slices or stored.form.box.shape != box.shape:
            raise DamagedError(f"the entry of slice {describe(box)} has another dtype or shape")
        pieces.append(stored.piece._replace(box=box))
    boxes = [piece.box for piece in pieces]
    if not countable(shape, boxes):
        raise DamagedError(f"{len(boxes)} slices in {len(shape)} dimensions are too many")
    fault = first_fault(shape, boxes)
    if fault is not None:
        raise DamagedError(f"element {fault[0]} of shape {shape} is in {fault[1]} of the slices")
    return tuple(pieces)


def _read_box(extents: list[tuple[int, int]], shape: Shape) -> Box:
    if len(extents) != len(shape):
        raise DamagedError(f"a slice of rank {len(extents)} in a tensor of rank {len(shape)}")
    lengths = tuple(extent if length == FULL else length for (_, length), extent in zip(extents, shape, strict=True))
    box = Box(tuple(start for start, _ in extents), lengths)
    if out_of_bounds(shape, (box,)):
        raise DamagedError(f"slice {describe(box)} is not inside shape {shape}")
    return box
