"""String tensors in a data shard: varint lengths, a masked crc32c of the lengths, the bytes.

Source: ``WriteStringTensor`` in ``tensorflow/core/util/tensor_bundle/tensor_bundle.cc``. The checksums cover
each length not as stored but as a little-endian uint32, or uint64 above 4 GiB.
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
_UINT32 = 0xFFFFFFFF


def encode_strings(values: np.ndarray[Any, Any] | Sequence[bytes | str], shape: Shape) -> tuple[bytes, int]:
    """The bytes of a string tensor and its entry's crc32c, not masked.

    ``values``: bytes (str is stored as UTF-8), in C order, as many as ``shape`` has elements.

    Raises:
        StateError: an element is neither bytes nor str, or there are more or fewer than the shape holds.
    """
    flat = values.ravel().tolist() if isinstance(values, np.ndarray) else list(values)
    if len(flat) != math.prod(shape):
        raise StateError(f"{len(flat)} strings do not fill a tensor of shape {shape}")
    items = [value if type(value) is bytes else _to_bytes(value, i) for i, value in enumerate(flat)]
    lengths = [len(item) for item in items]
    lengths_crc = crc32c(_fixed_width(lengths))
    tail = b"".join((mask(lengths_crc).to_bytes(_CRC_NBYTES, "little"), *items))
    return b"".join(map(varint, lengths)) + tail, crc32c(tail, lengths_crc)


def decode_strings(raw: bytes, count: int) -> list[bytes]:
    """The ``count`` elements of a string tensor, in C order.

    Raises:
        DamagedError: the lengths fail their checksum, or do not fit the bytes.
    """
    lengths, pos = _read_lengths(raw, count)
    out: list[bytes] = []
    for length in lengths:
        out.append(raw[pos : pos + length])
        pos += length
    return out


def strings_crc(raw: bytes, count: int) -> int:
    """The crc32c, not masked, that the entry of these ``count`` stored strings must have.

    Raises:
        DamagedError: as `decode_strings`.
    """
    lengths, pos = _read_lengths(raw, count)
    return crc32c(memoryview(raw)[pos - _CRC_NBYTES :], crc32c(_fixed_width(lengths)))


def _read_lengths(raw: bytes, count: int) -> tuple[list[int], int]:
    """The lengths and where the bytes begin, checked."""
    lengths: list[int] = []
    pos = 0
    for _ in range(count):
        length, pos = read_varint(raw, pos)
        lengths.append(length)
    found = mask(crc32c(_fixed_width(lengths)))
    expected = int.from_bytes(raw[pos : pos + _CRC_NBYTES], "little")
    pos += _CRC_NBYTES
    if found != expected:
        raise DamagedError(f"lengths of {count} strings: masked crc32c {found:08x}, should be {expected:08x}")
    if pos + sum(lengths) != len(raw):
        raise DamagedError(f"{count} strings need {pos + sum(lengths)} bytes, there are {len(raw)}")
    return lengths, pos


def _fixed_width(lengths: Iterable[int]) -> bytes:
    return b"".join([n.to_bytes(4 if n <= _UINT32 else 8, "little") for n in lengths])


def _to_bytes(value: object, i: int) -> bytes:
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError as error:
            raise StateError(f"string {i} has no UTF-8 form ({error.reason}); store it as bytes") from None
    if isinstance(value, bytes):
        return bytes(value)
    raise StateError(f"element {i} is a {type(value).__name__}; a string tensor holds bytes or str")
