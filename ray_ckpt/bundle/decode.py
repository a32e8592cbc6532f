"""The values of a bundle's index, decoded and checked: the reading side of `entry`.

Writers spell the entries of whole tensors in one way, and an index of many repeats few types and shapes: these
are taken apart by a pattern, in a third of the time that protobuf's objects take. All others go to protobuf.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_ckpt.bundle.crc import unmask
from ray_ckpt.bundle.dtypes import dtype_of_number, nbytes_of
from ray_ckpt.bundle.limits import MAX_ELEMENTS, MAX_RANK
from ray_ckpt.bundle.schema import BundleEntryProto
from ray_ckpt.errors import DamagedError
from ray_ckpt.types import Box


class Piece(NamedTuple):
    """One stored rectangle: ``nbytes`` bytes at ``offset`` of a data shard; ``crc`` is not masked.

    It is None where the bytes have never been summed up: of a snapshot that lies in memory only.
    """

    box: Box
    shard_id: int
    offset: int
    nbytes: int
    crc: int | None


class Form(NamedTuple):
    """A type and shape, and their size in bytes: None where the values decide. ``box`` is all of it."""

    dtype: str
    box: Box
    nbytes: int | None


class Entry(NamedTuple):
    """One value of the index. A partitioned tensor's has ``slices`` (TensorSliceProto), and a piece of nothing."""

    form: Form
    piece: Piece
    slices: Sequence[Any]


_HEAD = re.compile(rb"\x08[\x00-\x7f]\x12[\x00-\x7f]").match
"""The fields dtype and shape, whose length is the fourth byte."""

_VARINT = rb"([\x80-\xff]{0,%d}[\x00-\x7f])"
_TAIL = re.compile(rb"(?s)(?:\x18%b)?(?:\x20%b)?(?:\x28%b)?(?:\x35(.{4}))?" % (_VARINT % 3, _VARINT % 8, _VARINT % 8))
"""The fields shard_id, offset, size and crc32c, in order, each once at most, in fewer bits than would be a sign."""


class EntryDecoder:
    """Decodes the entries of one index of ``num_shards`` data shards."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._forms: dict[bytes, Form] = {}
        self._tail = _TAIL.fullmatch

    def decode(self, value: bytes) -> Entry:
        """One entry.

        Raises:
            DamagedError: it cannot be true: an unknown type, not a shape, bytes that do not fit it, no such shard.
            DecodeError: not an entry at all.
        """
        head = value[: 4 + value[3]] if len(value) > 3 else value
        tail = self._tail(value, len(head))
        if tail is None:
            return self._decode_any(value)
        form = self._forms.get(head)
        if form is None:
            if not _HEAD(head):
                return self._decode_any(value)
            form = self._forms[head] = _form(BundleEntryProto.FromString(head))
        shard_id, offset, nbytes, crc = tail.groups(b"")
        return Entry(
            form,
            self._piece(form, _number(shard_id), _number(offset), _number(nbytes), int.from_bytes(crc, "little")),
            (),
        )

    def _decode_any(self, value: bytes) -> Entry:
        proto = BundleEntryProto.FromString(value)
        form = _form(proto)
        if proto.slices:
            return Entry(form, Piece(form.box, 0, 0, 0, 0), proto.slices)
        return Entry(form, self._piece(form, proto.shard_id, proto.offset, proto.size, proto.crc32c), ())

    def _piece(self, form: Form, shard_id: int, offset: int, nbytes: int, masked_crc: int) -> Piece:
        if not 0 <= shard_id < self._num_shards or offset < 0 or nbytes < 0:
            raise DamagedError(f"{nbytes} bytes at {offset} of shard {shard_id} of {self._num_shards} cannot be")
        dtype, box, expected = form
        if nbytes != expected and (expected is not None or nbytes < box.size):
            raise DamagedError(f"{dtype} of shape {box.shape} takes {expected} bytes, the entry says {nbytes}")
        return Piece(box, shard_id, offset, nbytes, unmask(masked_crc))


def _form(proto: Any) -> Form:
    dtype = dtype_of_number(proto.dtype)
    if dtype is None:
        raise DamagedError(f"dtype number {proto.dtype} is none that TensorFlow 2.21 has")
    shape = tuple([dim.size for dim in proto.shape.dim])
    if proto.shape.unknown_rank or len(shape) > MAX_RANK or (shape and min(shape) < 0):
        raise DamagedError(f"shape {shape[:MAX_RANK]} is not one of a tensor")
    count = math.prod(shape)
    if count > MAX_ELEMENTS:
        raise DamagedError(f"shape {shape} has too many elements")
    return Form(dtype, Box.whole(shape), nbytes_of(dtype, count))


def _number(varint: bytes) -> int:
    """A whole varint; 0 for a field that is left out."""
    if len(varint) == 1:
        return varint[0]
    value = 0
    for byte in varint[::-1]:
        value = value << 7 | byte & 0x7F
    return value
