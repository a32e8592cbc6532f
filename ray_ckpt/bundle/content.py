"""The checksum that an entry must have for its stored bytes, whatever the element type.

Source: ``WriteStringTensor`` and ``WriteVariantTensor`` in
``tensorflow/core/util/tensor_bundle/tensor_bundle.cc``.
"""

from __future__ import annotations

from ray_ckpt.bundle.coding import read_varint
from ray_ckpt.bundle.crc import crc32c, mask
from ray_ckpt.bundle.dtypes import STRING
from ray_ckpt.bundle.strings import strings_crc
from ray_ckpt.errors import DamagedError

_CRC_NBYTES = 4


def content_crc(dtype: str, count: int, raw: bytes) -> int:
    """The crc32c, not masked, of ``count`` stored elements: what `Piece.crc` must equal.

    Raises:
        DamagedError: the bytes of a string or variant tensor contradict themselves.
    """
    if dtype == STRING:
        return strings_crc(raw, count)
    if dtype == "variant":
        return _variants_crc(raw, count)
    return crc32c(raw)


def _variants_crc(raw: bytes, count: int) -> int:
    """Per element a varint length, a proto, and the masked running crc; lengths count as uint64."""
    view = memoryview(raw)
    crc = pos = 0
    for i in range(count):
        length, pos = read_varint(raw, pos)
        stop = pos + length
        crc = crc32c(view[pos:stop], crc32c(length.to_bytes(8, "little"), crc))
        stored = raw[stop : stop + _CRC_NBYTES]
        if stored != mask(crc).to_bytes(_CRC_NBYTES, "little"):
            raise DamagedError(f"element {i} of a variant tensor fails its checksum")
        crc = crc32c(stored, crc)
        pos = stop + _CRC_NBYTES
    if pos != len(raw):
        raise DamagedError(f"{count} variants need {pos} bytes, there are {len(raw)}")
    return crc
