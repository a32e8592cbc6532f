"""CRC-32C (Castagnoli) of buffers, its masked form in leveldb files, and the crc of a concatenation."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from crc32c import crc32c as _crc32c

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MASK_DELTA = 0xA282EAD8
_UINT32 = 0xFFFFFFFF
_POLYNOMIAL = 0x82F63B78
"""The Castagnoli polynomial in reflected bit order: bit 31 is the coefficient of x^0."""


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C of a C-contiguous buffer that continues ``crc``; releases the GIL on large buffers."""
    return _crc32c(data, crc)


def mask(crc: int) -> int:
    """The form that leveldb and TensorFlow store, so that a crc over stored crcs stays strong."""
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & _UINT32


def unmask(crc: int) -> int:
    """The inverse of `mask`."""
    rotated = (crc - _MASK_DELTA) & _UINT32
    return ((rotated >> 17) | (rotated << 15)) & _UINT32


def combine(crc_a: int, crc_b: int, len_b: int) -> int:
    """CRC-32C of ``a + b`` from those of ``a`` and ``b`` and the length of ``b`` in bytes.

    Appending n bytes multiplies a crc by x^(8n) modulo the polynomial (zlib's ``crc32_combine``).
    """
    return _multiply(_power(8 * len_b), crc_a) ^ crc_b


def _multiply(a: int, b: int) -> int:
    """The product modulo the polynomial, over GF(2), all in reflected bit order."""
    product = 0
    bit = 1 << 31
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial; cached, as the pieces of one save share few lengths."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result
