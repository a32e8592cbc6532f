"""The leveldb table: round trips, and blocks that are damaged or hostile."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle import crc32c, mask
from ray_ckpt.bundle.coding import read_varint, varint
from ray_ckpt.bundle.table import read_table, write_table
from ray_ckpt.errors import DamagedError

Pairs = list[tuple[bytes, bytes]]

SORTED_PAIRS = st.dictionaries(st.binary(max_size=20), st.binary(max_size=40), max_size=60).map(
    lambda pairs: sorted(pairs.items())
)


def block_of(pairs: Pairs) -> bytes:
    """The only data block of a small table, without its trailer."""
    raw = write_table(pairs)
    meta_offset, _ = read_varint(raw, len(raw) - 48)
    return raw[: meta_offset - 5]


def file_of_blocks(bodies: list[bytes], order: list[int]) -> bytes:
    """A table whose index names these data blocks (without trailers) in this order, all checksums sound."""
    raw, handles = b"", []

    def put(body: bytes) -> bytes:
        nonlocal raw
        handle = varint(len(raw)) + varint(len(body))
        raw += body + b"\0" + struct.pack("<I", mask(crc32c(body + b"\0")))
        return handle

    for body in bodies:
        handles.append(put(body))
    entries = b""
    for i, at in enumerate(order):
        key = b"\xff" + struct.pack(">I", i)
        entries += bytes((0, len(key), len(handles[at]))) + key + handles[at]
    meta = put(struct.pack("<II", 0, 1))
    index = put(entries + struct.pack("<II", 0, 1))
    return raw + (meta + index).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


@given(SORTED_PAIRS)
def test_tables_round_trip(pairs: Pairs) -> None:
    assert read_table(write_table(pairs)) == pairs


def test_tables_of_many_blocks_round_trip() -> None:
    pairs = [(b"%07d" % i * 10, b"v" * (i % 300)) for i in range(9000)]
    raw = write_table(pairs)
    assert len(raw) > 3 * 262144
    assert read_table(raw) == pairs


def test_block_that_is_named_again_and_again() -> None:
    block = block_of([(b"k", b"v")])
    assert read_table(file_of_blocks([block], [0])) == [(b"k", b"v")]
    with pytest.raises(DamagedError, match="overlaps another"):
        read_table(file_of_blocks([block], [0] * 10_000))


def test_shared_prefixes_that_stand_for_terabytes() -> None:
    key = b"\x01" * (1 << 20)
    entries = [b"\0" + varint(len(key)) + b"\0" + key]
    for i in range(200_000):
        entries.append(varint(len(key)) + bytes((4, 0)) + struct.pack(">I", i))
    with pytest.raises(DamagedError, match="runs past its end"):
        read_table(file_of_blocks([b"".join((*entries, struct.pack("<II", 0, 1)))], [0]))


@pytest.mark.parametrize(
    ("bodies", "message"),
    [
        ([b"\5\1\0k" + struct.pack("<II", 0, 1)], "runs past its end"),
        ([b"\0\1\5k" + struct.pack("<II", 0, 1)], "runs past its end"),
        ([b"\0\1\0b\0\1\0a" + struct.pack("<II", 0, 1)], "b'a' follows b'b'"),
        ([b"\0\1\0a" * 2 + struct.pack("<II", 0, 1)], "b'a' follows b'a'"),
        ([b"\0\1\0a" + struct.pack("<II", 0, 1000)], "cannot hold 1000 restarts"),
        ([b"\0\1"], "too short"),
        ([block_of([(b"b", b"")]), block_of([(b"a", b"")])], "out of order"),
        ([block_of([(b"\xff\xff", b"")])], "out of order"),
    ],
)
def test_blocks_with_sound_checksums(bodies: list[bytes], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        read_table(file_of_blocks(bodies, list(range(len(bodies)))))


def test_block_beyond_the_end() -> None:
    raw = write_table([(b"k", b"v")])
    footer = (varint(10**6) + varint(8) + varint(0) + varint(8)).ljust(40, b"\0")
    with pytest.raises(DamagedError, match="block at 1000000 of 8 bytes does not fit"):
        read_table(raw[:-48] + footer + raw[-8:])


def test_compressed_block() -> None:
    body = struct.pack("<II", 0, 1)
    raw = bytearray(file_of_blocks([body], [0]))
    raw[len(body)] = 1
    raw[len(body) + 1 : len(body) + 5] = struct.pack("<I", mask(crc32c(body + b"\1")))
    with pytest.raises(DamagedError, match="compressed"):
        read_table(bytes(raw))
