"""Variant tensors in a data shard: for each element a varint length, its bytes, a masked running crc32c.

The bytes are a serialized VariantTensorDataProto. Source: ``WriteVariantTensor`` in
``tensorflow/core/util/tensor_bundle/tensor_bundle.cc``. The checksums count each length as a little-endian uint64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ray_ckpt.bundle.coding import read_varint, varint
from ray_ckpt.bundle.crc import crc32c, mask
from ray_ckpt.errors import DamagedError, StateError
from ray_ckpt.types import Shape

_CRC_NBYTES = 4


def encode_variants(values: np.ndarray[Any, Any] | Sequence[bytes], shape: Shape) -> tuple[bytes, int]:
    """The bytes of a variant tensor and its entry's crc32c, not masked.

    ``values``: serialized VariantTensorDataProto in C order, as many as ``shape`` has elements.

    Raises:
        StateError: an element is not bytes, or there are more or fewer than the shape holds.
    """
    flat: Iterable[Any] = values.ravel().tolist() if isinstance(values, np.ndarray) else values
    items = list(flat)
    if len(items) != math.prod(shape):
        raise StateError(f"{len(items)} variants do not fill a tensor of shape {shape}")
    parts: list[bytes] = []
    crc = 0
    for i, item in enumerate(items):
        if not isinstance(item, bytes):
            raise StateError(f"element {i} is a {type(item).__name__}; a variant tensor holds serialized elements")
        crc = crc32c(item, crc32c(len(item).to_bytes(8, "little"), crc))
        stored = mask(crc).to_bytes(_CRC_NBYTES, "little")
        crc = crc32c(stored, crc)
        parts += (varint(len(item)), item, stored)
    return b"".join(parts), crc


def decode_variants(raw: bytes, count: int) -> list[bytes]:
    """The ``count`` elements of a variant tensor, in C order.

    Raises:
        DamagedError: an element fails its checksum, or the lengths do not fit the bytes.
    """
    return _read(raw, count)[0]


def variants_crc(raw: bytes, count: int) -> int:
    """The crc32c, not masked, that the entry of these ``count`` stored variants must have.

    Raises:
        DamagedError: as `decode_variants`.
    """
    return _read(raw, count)[1]


def _read(raw: bytes, count: int) -> tuple[list[bytes], int]:
    found: list[bytes] = []
    crc = pos = 0
    for i in range(count):
        length, pos = read_varint(raw, pos)
        stop = pos + length
        item, stored = raw[pos:stop], raw[stop : stop + _CRC_NBYTES]
        crc = crc32c(item, crc32c(length.to_bytes(8, "little"), crc))
        if stored != mask(crc).to_bytes(_CRC_NBYTES, "little"):
            raise DamagedError(f"element {i} of a variant tensor fails its checksum")
        crc = crc32c(stored, crc)
        pos = stop + _CRC_NBYTES
        found.append(item)
    if pos != len(raw):
        raise DamagedError(f"{count} variants need {pos} bytes, there are {len(raw)}")
    return found, crc
