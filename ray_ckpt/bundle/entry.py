"""The values of a bundle's index: what and where each tensor and each slice is.

Source: ``tensorflow/core/protobuf/tensor_bundle.proto``. A full dimension of a slice is an Extent without
``length``; a slice's key must be spelled the same way as the slice in its tensor's entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ray_ckpt.bundle.coding import slice_key, varint
from ray_ckpt.bundle.crc import mask
from ray_ckpt.bundle.dtypes import dtype_number
from ray_ckpt.bundle.schema import BundleEntryProto, BundleHeaderProto
from ray_ckpt.types import Box, Shape

HEADER_KEY = b""
FORMAT_VERSION = 1
"""Producer version of the bundle format that TensorFlow writes and the highest it reads."""

FULL = -1
"""``length`` of an extent that is a whole dimension."""


def piece_key(name: str, box: Box, shape: Shape) -> bytes:
    """Key of the entry of one stored rectangle: the name itself where it is the whole tensor."""
    if box.shape == shape:
        return name.encode()
    return slice_key(name.encode(), _extents(box, shape))


def encode_piece(dtype: str, shape: Shape, shard_id: int, offset: int, nbytes: int, crc: int) -> bytes:
    """Value of the entry of one stored rectangle of this shape.

    ``offset`` and ``nbytes`` are its place in the data shard, ``crc`` its crc32c, not masked.

    Raises:
        StateError: unknown dtype.
    """
    # Zeros are left out, as protobuf does. By hand: this runs once a tensor, the head once a shape.
    parts = [_head(dtype, shape)]
    if shard_id:
        parts += (b"\x18", varint(shard_id))
    if offset:
        parts += (b"\x20", varint(offset))
    if nbytes:
        parts += (b"\x28", varint(nbytes))
    masked = mask(crc)
    if masked:
        parts += (b"\x35", masked.to_bytes(4, "little"))
    return b"".join(parts)


def encode_partitioned(dtype: str, shape: Shape, boxes: Sequence[Box]) -> bytes:
    """Value of the entry, under the tensor's own name, that lists the slices it is stored in.

    Raises:
        StateError: unknown dtype.
    """
    entry = BundleEntryProto.FromString(_head(dtype, shape))
    for box in boxes:
        listed = entry.slices.add()
        for start, length in _extents(box, shape):
            extent = listed.extent.add()
            if length != FULL:
                extent.start, extent.length = start, length
    return bytes(entry.SerializeToString())


def encode_header(num_shards: int) -> bytes:
    """Value of the entry under the empty key: little-endian, version 1."""
    header = BundleHeaderProto(num_shards=num_shards)
    header.version.producer = FORMAT_VERSION
    return bytes(header.SerializeToString())


def _extents(box: Box, shape: Shape) -> list[tuple[int, int]]:
    return [
        (0, FULL) if n == extent else (start, n) for start, n, extent in zip(box.offset, box.shape, shape, strict=True)
    ]


@lru_cache(maxsize=4096)
def _head(dtype: str, shape: Shape) -> bytes:
    entry = BundleEntryProto(dtype=dtype_number(dtype))
    entry.shape.SetInParent()
    for extent in shape:
        entry.shape.dim.add(size=extent)
    return bytes(entry.SerializeToString())
