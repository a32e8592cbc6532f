"""The stored bytes of a tensor and the checksum that their entry must have, whatever the element type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_ckpt.bundle.crc import crc32c
from ray_ckpt.bundle.dtypes import STRING, VARIANT
from ray_ckpt.bundle.strings import decode_strings, encode_strings, strings_crc
from ray_ckpt.bundle.variants import decode_variants, encode_variants, variants_crc
from ray_ckpt.types import Shape


def content_crc(dtype: str, count: int, raw: bytes) -> int:
    """The crc32c, not masked, of ``count`` stored elements: what `Piece.crc` must equal.

    Raises:
        DamagedError: the bytes of a string or variant tensor contradict themselves.
    """
    if dtype == STRING:
        return strings_crc(raw, count)
    if dtype == VARIANT:
        return variants_crc(raw, count)
    return crc32c(raw)


def encode_objects(dtype: str, values: np.ndarray[Any, Any] | Sequence[bytes | str], shape: Shape) -> tuple[bytes, int]:
    """The bytes of a tensor whose elements have no fixed size, and its entry's crc32c, not masked.

    Raises:
        StateError: the elements are not of the dtype, or do not fill the shape.
    """
    return encode_variants(values, shape) if dtype == VARIANT else encode_strings(values, shape)  # type: ignore[arg-type]


def decode_objects(dtype: str, raw: bytes, count: int) -> list[bytes]:
    """The ``count`` elements, without a fixed size, of such a tensor, in C order.

    Raises:
        DamagedError: they fail their checksums, or do not fit the bytes.
    """
    return decode_variants(raw, count) if dtype == VARIANT else decode_strings(raw, count)
