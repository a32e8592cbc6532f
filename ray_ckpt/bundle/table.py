"""The leveldb table that a bundle's index is: sorted keys and values in checksummed blocks.

Source: ``third_party/xla/xla/tsl/lib/io/{table_builder,block_builder,format}.cc`` in TensorFlow's tree. What
is written here is byte for byte what TensorFlow's `TableBuilder` writes with the options of a bundle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from ray_ckpt.bundle.coding import read_varint, varint
from ray_ckpt.bundle.crc import crc32c, mask, unmask
from ray_ckpt.errors import DamagedError

BLOCK_NBYTES = 262144
"""A data block is closed once it is this large."""

_LARGE_ENTRY_NBYTES = 2 * BLOCK_NBYTES
_RESTART_INTERVAL = 16
_TRAILER_NBYTES = 5
_HANDLES_NBYTES = 40
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER_NBYTES = _HANDLES_NBYTES + len(_MAGIC)
_UNCOMPRESSED = 0

_KEY_EXPANSION = 64
"""Bound on the bytes of all keys over the bytes of the file.

Keys share prefixes, so a small hostile table could stand for terabytes. TensorFlow writes every 16th key in
full, which makes the keys at most 16 times as large as the file.
"""

Pair = tuple[bytes, bytes]


class _Handle(NamedTuple):
    """Where a block lies, without its trailer."""

    offset: int
    nbytes: int

    def encode(self) -> bytes:
        return varint(self.offset) + varint(self.nbytes)


def shared_prefix(a: bytes, b: bytes) -> int:
    """Number of leading bytes that are equal."""
    n = min(len(a), len(b))
    difference = int.from_bytes(a[:n], "big") ^ int.from_bytes(b[:n], "big")
    return n - (difference.bit_length() + 7) // 8


class _BlockBuilder:
    """One block: prefix-compressed entries, then where the full keys are."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._parts: list[bytes] = []
        self._restarts = [0]
        self._nbytes = 0
        self._count = 0
        self._last_key = b""

    @property
    def nbytes(self) -> int:
        """Size of the finished block."""
        return self._nbytes + 4 * len(self._restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self._count % self._interval:
            shared = shared_prefix(key, self._last_key)
        elif self._count:
            self._restarts.append(self._nbytes)
        self._count += 1
        self._last_key = key
        lengths = (shared, len(key) - shared, len(value))
        head = bytes(lengths) if max(lengths) < 0x80 else b"".join(map(varint, lengths))
        self._parts += (head, key[shared:], value)
        self._nbytes += len(head) + len(key) - shared + len(value)

    def finish(self) -> bytes:
        restarts = struct.pack(f"<{len(self._restarts) + 1}I", *self._restarts, len(self._restarts))
        return b"".join((*self._parts, restarts))


class _TableBuilder:
    def __init__(self) -> None:
        self._out: list[bytes] = []
        self._nbytes = 0
        self._block = _BlockBuilder(_RESTART_INTERVAL)
        self._index = _BlockBuilder(1)
        self._last_key: bytes | None = None
        self._closed: _Handle | None = None

    def add(self, key: bytes, value: bytes) -> None:
        if self._last_key is not None and len(key) + len(value) >= _LARGE_ENTRY_NBYTES:
            self._close_block()
        if self._closed is not None and self._last_key is not None:
            self._index.add(_separator(self._last_key, key), self._closed.encode())
            self._closed = None
        self._block.add(key, value)
        self._last_key = key
        if self._block.nbytes >= BLOCK_NBYTES:
            self._close_block()

    def finish(self) -> bytes:
        self._close_block()
        meta = self._put(_BlockBuilder(_RESTART_INTERVAL))
        if self._closed is not None and self._last_key is not None:
            self._index.add(_successor(self._last_key), self._closed.encode())
        index = self._put(self._index)
        handles = (meta.encode() + index.encode()).ljust(_HANDLES_NBYTES, b"\x00")
        return b"".join((*self._out, handles, _MAGIC))

    def _close_block(self) -> None:
        # A key is only ever pending while the block is empty: `_closed` set means nothing was added since.
        if self._closed is None and self._last_key is not None:
            self._closed = self._put(self._block)
            self._block = _BlockBuilder(_RESTART_INTERVAL)

    def _put(self, block: _BlockBuilder) -> _Handle:
        body = block.finish() + bytes((_UNCOMPRESSED,))
        handle = _Handle(self._nbytes, len(body) - 1)
        self._out += (body, struct.pack("<I", mask(crc32c(body))))
        self._nbytes += len(body) + 4
        return handle


def _separator(start: bytes, limit: bytes) -> bytes:
    """A short key k with ``start <= k < limit``: the block's entry in the index."""
    i = shared_prefix(start, limit)
    if i < min(len(start), len(limit)) and start[i] + 1 < limit[i]:
        return start[:i] + bytes((start[i] + 1,))
    return start


def _successor(key: bytes) -> bytes:
    """A short key at or after ``key``."""
    for i, byte in enumerate(key):
        if byte != 0xFF:
            return key[:i] + bytes((byte + 1,))
    return key


def write_table(pairs: Iterable[Pair]) -> bytes:
    """The whole table of (key, value) pairs that come sorted by key, each key once."""
    table = _TableBuilder()
    for key, value in pairs:
        table.add(key, value)
    return table.finish()


def read_table(raw: bytes) -> list[Pair]:
    """All (key, value) pairs, in key order, every checksum verified.

    Raises:
        DamagedError: anything but a whole, uncompressed table with strictly growing keys.
    """
    meta, index = _read_footer(raw)
    end = min(meta.offset, index.offset)
    budget = _KEY_EXPANSION * len(raw)
    _read_block(raw, meta, budget)
    pairs: list[Pair] = []
    pos = 0
    for limit, value in _read_block(raw, index, budget):
        handle, _ = _read_handle(value, 0)
        if handle.offset < pos or handle.offset + handle.nbytes + _TRAILER_NBYTES > end:
            raise DamagedError(f"block at {handle.offset} overlaps another")
        pos = handle.offset + handle.nbytes + _TRAILER_NBYTES
        block = _read_block(raw, handle, budget)
        budget -= sum(len(key) for key, _ in block)
        if not block or block[-1][0] > limit or (pairs and pairs[-1][0] >= block[0][0]):
            raise DamagedError(f"keys of the block at {handle.offset} are out of order")
        pairs += block
    return pairs


def _read_footer(raw: bytes) -> tuple[_Handle, _Handle]:
    if len(raw) < _FOOTER_NBYTES:
        raise DamagedError(f"{len(raw)} bytes are too few for a checkpoint index")
    footer = raw[-_FOOTER_NBYTES:]
    if not footer.endswith(_MAGIC):
        raise DamagedError("does not end like a checkpoint index: another kind of file, or cut short")
    meta, pos = _read_handle(footer, 0)
    index, _ = _read_handle(footer, pos)
    return meta, index


def _read_handle(data: bytes, pos: int) -> tuple[_Handle, int]:
    offset, pos = read_varint(data, pos)
    nbytes, pos = read_varint(data, pos)
    return _Handle(offset, nbytes), pos


def _read_block(raw: bytes, handle: _Handle, budget: int) -> list[Pair]:
    """The entries of one block; ``budget`` bounds the bytes of their keys."""
    stop = handle.offset + handle.nbytes
    if stop + _TRAILER_NBYTES > len(raw) - _FOOTER_NBYTES:
        raise DamagedError(f"block at {handle.offset} of {handle.nbytes} bytes does not fit in {len(raw)}")
    body = raw[handle.offset : stop + 1]
    found = crc32c(body)
    expected = unmask(int.from_bytes(raw[stop + 1 : stop + _TRAILER_NBYTES], "little"))
    if found != expected:
        raise DamagedError(f"block at {handle.offset}: crc32c is {found:08x}, should be {expected:08x}")
    if body[-1] != _UNCOMPRESSED:
        raise DamagedError(f"block at {handle.offset} is compressed, which no checkpoint index is")
    if handle.nbytes < 4:
        raise DamagedError(f"block at {handle.offset} of {handle.nbytes} bytes is too short")
    restarts = int.from_bytes(body[-5:-1], "little")
    end = handle.nbytes - 4 - 4 * restarts
    if end < 0:
        raise DamagedError(f"block at {handle.offset} cannot hold {restarts} restarts")
    return _read_entries(body, end, budget)


def _read_entries(body: bytes, end: int, budget: int) -> list[Pair]:
    entries: list[Pair] = []
    key, pos = b"", 0
    while pos < end:
        shared, own, length = body[pos], body[pos + 1], body[pos + 2]
        pos += 3
        if max(shared, own, length) >= 0x80:
            shared, pos = read_varint(body, pos - 3)
            own, pos = read_varint(body, pos)
            length, pos = read_varint(body, pos)
        value_at = pos + own
        stop = value_at + length
        budget -= shared + own
        if shared > len(key) or stop > end or budget < 0:
            raise DamagedError(f"entry {len(entries)} of a block runs past its end")
        last, key = key, key[:shared] + body[pos:value_at]
        if entries and key <= last:
            raise DamagedError(f"key {key[:80]!r} follows {last[:80]!r}")
        entries.append((key, body[value_at:stop]))
        pos = stop
    return entries
