"""Integers and keys as bytes: protobuf's varints, and the ordered code of slice keys.

Source: ``tensorflow/core/lib/strings/ordered_code.cc`` and ``EncodeTensorNameSlice`` in
``tensorflow/core/util/saved_tensor_slice_util.cc``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ray_ckpt.errors import DamagedError

_VARINT_LIMIT = 1 << 64
_SLICE_MARK = b"\x00"
_STRING_END = b"\x00\x01"
_ESCAPED_BYTE = re.compile(rb"[\x00\xff]")
_ESCAPE = re.compile(rb"\x00\xff|\xff\x00")
_SLICE_KEY = re.compile(rb"(?s)\x00((?:[^\x00\xff]|\x00\xff|\xff\x00)*)\x00\x01")


def varint(value: int) -> bytes:
    """A non-negative integer below 2^64, seven bits a byte, lowest first."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, pos: int) -> tuple[int, int]:
    """The varint at ``pos`` and the position after it.

    Raises:
        DamagedError: it runs past the end of ``data`` or holds more than 64 bits.
    """
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[pos : pos + 10], strict=False):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= _VARINT_LIMIT:
                break
            return value, pos + shift // 7 + 1
    raise DamagedError(f"no valid varint at byte {pos} of {len(data)}")


def ordered_unsigned(value: int) -> bytes:
    """A length byte, then the value big-endian without leading zeros."""
    nbytes = (value.bit_length() + 7) // 8
    return bytes((nbytes,)) + value.to_bytes(nbytes, "big")


def ordered_signed(value: int) -> bytes:
    """A 64-bit integer whose bytes sort like its value.

    n bytes hold 7n - 1 bits of magnitude: two's complement, with the top n bits flipped.
    """
    magnitude = ~value if value < 0 else value
    nbytes = magnitude.bit_length() // 7 + 1
    header = ((1 << nbytes) - 1) << (7 * nbytes)
    return ((value & ((1 << 8 * nbytes) - 1)) ^ header).to_bytes(nbytes, "big")


def ordered_string(value: bytes) -> bytes:
    """The bytes with 00 written as 00 ff and ff as ff 00, then 00 01."""
    return _ESCAPED_BYTE.sub(lambda match: match[0] + bytes((match[0][0] ^ 0xFF,)), value) + _STRING_END


def slice_key(name: bytes, extents: Sequence[tuple[int, int]]) -> bytes:
    """Key of one stored slice; a whole dimension is (0, -1)."""
    parts = [_SLICE_MARK, ordered_string(name), ordered_unsigned(len(extents))]
    for start, length in extents:
        parts.append(ordered_signed(start))
        parts.append(ordered_signed(length))
    return b"".join(parts)


def is_slice_key(key: bytes) -> bool:
    """True for the key of one slice, False for a tensor's own."""
    return key.startswith(_SLICE_MARK)


def key_name(key: bytes) -> str:
    """The tensor's name in any key, for messages: undecodable bytes are replaced."""
    match = _SLICE_KEY.match(key)
    name = _ESCAPE.sub(lambda escape: escape[0][:1], match[1]) if match else key
    return name.decode("utf-8", "replace")
