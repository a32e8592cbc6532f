"""Reading a checkpoint's ``.index``: which tensors there are, and where their bytes lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from ray_ckpt.bundle.coding import is_slice_key, key_name, slice_key
from ray_ckpt.bundle.cover import countable, first_fault, out_of_bounds
from ray_ckpt.bundle.crc import unmask
from ray_ckpt.bundle.dtypes import dtype_of_number, nbytes_of
from ray_ckpt.bundle.entry import FORMAT_VERSION, FULL, HEADER_KEY
from ray_ckpt.bundle.limits import MAX_ELEMENTS, MAX_PARTITIONED_RANK, MAX_RANK, describe
from ray_ckpt.bundle.schema import BundleEntryProto, BundleHeaderProto
from ray_ckpt.bundle.table import read_table
from ray_ckpt.errors import DamagedError
from ray_ckpt.types import Box, Shape

_LITTLE_ENDIAN = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored rectangle: ``nbytes`` bytes at ``offset`` of a data shard; ``crc`` is not masked."""

    box: Box
    shard_id: int
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
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
    entries: dict[bytes, Any] = {}
    slices: dict[bytes, Any] = {}
    for key, value in pairs[1:]:
        (slices if is_slice_key(key) else entries)[key] = BundleEntryProto.FromString(value)
    tensors: dict[str, StoredTensor] = {}
    for key, entry in entries.items():
        name = _decode_name(key)
        try:
            tensors[name] = _read_tensor(name, entry, slices, num_shards)
        except DamagedError as error:
            raise DamagedError(f"{name}: {error}") from None
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


def _read_tensor(name: str, entry: Any, slices: dict[bytes, Any], num_shards: int) -> StoredTensor:
    """The tensor of one full entry; takes the slices it lists out of ``slices``."""
    dtype = dtype_of_number(entry.dtype)
    if dtype is None:
        raise DamagedError(f"dtype number {entry.dtype} is none that TensorFlow 2.21 has")
    shape = _read_shape(entry)
    if not entry.slices:
        pieces: tuple[Piece, ...] = (_read_piece(entry, dtype, Box.whole(shape), num_shards),)
    else:
        pieces = _read_slices(name, entry, dtype, shape, slices, num_shards)
    return StoredTensor(name, dtype, shape, pieces)


def _read_shape(entry: Any) -> Shape:
    shape = tuple([dim.size for dim in entry.shape.dim])
    if entry.shape.unknown_rank or len(shape) > MAX_RANK or (shape and min(shape) < 0):
        raise DamagedError(f"shape {shape[:MAX_RANK]} is not one of a tensor")
    if math.prod(shape) > MAX_ELEMENTS:
        raise DamagedError(f"shape {shape} has too many elements")
    return shape


def _read_piece(entry: Any, dtype: str, box: Box, num_shards: int) -> Piece:
    shard_id, offset, nbytes = entry.shard_id, entry.offset, entry.size
    if not 0 <= shard_id < num_shards or offset < 0 or nbytes < 0:
        raise DamagedError(f"{nbytes} bytes at {offset} of shard {shard_id} of {num_shards} cannot be")
    expected = nbytes_of(dtype, box.size)
    if nbytes != expected and (expected is not None or nbytes < box.size):
        raise DamagedError(f"{dtype} of shape {box.shape} takes {expected} bytes, the entry says {nbytes}")
    return Piece(box, shard_id, offset, nbytes, unmask(entry.crc32c))


def _read_slices(
    name: str, entry: Any, dtype: str, shape: Shape, slices: dict[bytes, Any], num_shards: int
) -> tuple[Piece, ...]:
    if len(shape) > MAX_PARTITIONED_RANK:
        raise DamagedError(f"rank {len(shape)} in slices, TensorFlow has at most {MAX_PARTITIONED_RANK}")
    encoded_name = name.encode()
    pieces: list[Piece] = []
    for listed in entry.slices:
        extents = [(e.start, e.length if e.HasField("length") else FULL) for e in listed.extent]
        box = _read_box(extents, shape)
        stored = slices.pop(slice_key(encoded_name, extents), None)
        if stored is None:
            raise DamagedError(f"slice {describe(box)} is listed but not stored, or listed twice")
        if stored.dtype != entry.dtype or stored.slices or _read_shape(stored) != box.shape:
            raise DamagedError(f"the entry of slice {describe(box)} has another dtype or shape")
        pieces.append(_read_piece(stored, dtype, box, num_shards))
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
