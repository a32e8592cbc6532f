"""Entries taken apart by the pattern mean what protobuf says that they mean, whatever their bytes."""

from __future__ import annotations

import random

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle.crc import mask
from ray_ckpt.bundle.decode import Entry, EntryDecoder
from ray_ckpt.bundle.dtypes import dtype_of_number, nbytes_of
from ray_ckpt.bundle.entry import encode_piece
from ray_ckpt.bundle.schema import BundleEntryProto
from ray_ckpt.errors import DamagedError
from ray_ckpt.types import Box
from tests.bundle.test_index import mutated

NUM_SHARDS = 1 << 30
INT64 = st.integers(0, 2**63 - 1)


def meaning(value: bytes) -> tuple[object, ...] | None:
    """(dtype, dims, shard, offset, size, crc) that protobuf finds, None for what no entry of a whole tensor can be."""
    try:
        proto = BundleEntryProto.FromString(value)
    except DecodeError:
        return None
    dims = tuple(dim.size for dim in proto.shape.dim)
    return dtype_of_number(proto.dtype), dims, proto.shard_id, proto.offset, proto.size, proto.crc32c


def found(value: bytes) -> tuple[object, ...] | None:
    try:
        entry: Entry = EntryDecoder(NUM_SHARDS).decode(value)
    except (DecodeError, DamagedError):
        return None
    piece = entry.piece
    assert piece.box == entry.form.box == Box.whole(piece.box.shape)
    if entry.slices:
        return None
    return entry.form.dtype, piece.box.shape, *piece[1:4], mask(piece.crc)


@given(
    st.sampled_from(["float32", "bool", "string", "bfloat16"]),
    st.lists(st.integers(0, 300), max_size=4).map(tuple),
    st.integers(0, NUM_SHARDS - 1),
    INT64,
    INT64,
    st.integers(0, 2**32 - 1),
)
def test_every_entry_that_is_written(
    dtype: str, shape: tuple[int, ...], shard_id: int, offset: int, nbytes: int, crc: int
) -> None:
    box = Box.whole(shape)
    expected = nbytes_of(dtype, box.size)
    nbytes = max(nbytes, box.size) if expected is None else expected
    value = encode_piece(dtype, shape, shard_id, offset, nbytes, crc)
    assert EntryDecoder(NUM_SHARDS).decode(value).piece == (box, shard_id, offset, nbytes, crc)
    assert found(value) == meaning(value)


def test_mutated_entries_mean_the_same(seed: int) -> None:
    rng = random.Random(seed)
    sound = 0
    for _ in range(20_000):
        whole = encode_piece("float32", (2, 300), rng.choice((0, 3, 500)), rng.choice((0, 9, 2**40)), 2400, 7)
        value = mutated(rng, whole)
        what = found(value)
        if what is not None:
            assert what == meaning(value)
            sound += 1
    assert sound


def test_a_field_that_comes_twice() -> None:
    whole = encode_piece("float32", (2, 3), 1, 8, 24, 7)
    other_shard = BundleEntryProto(shard_id=2).SerializeToString()
    other_shape = BundleEntryProto(shape={"dim": [{"size": 1}]}).SerializeToString()
    assert found(whole + other_shard) == ("float32", (2, 3), 2, 8, 24, mask(7))
    assert found(other_shard + whole) == ("float32", (2, 3), 1, 8, 24, mask(7))
    assert found(whole + other_shape) == ("float32", (2, 3, 1), 1, 8, 24, mask(7))
    assert found(other_shape + whole) == ("float32", (1, 2, 3), 1, 8, 24, mask(7))


def test_numbers_of_too_many_bits_wrap_as_in_protobuf() -> None:
    whole = encode_piece("float32", (2, 3), 0, 0, 24, 7)
    head = whole[: 4 + whole[3]]
    wrapped = head + b"\x18\x81\x80\x80\x80\x10" + whole[len(head) :]
    assert found(wrapped) == meaning(wrapped) == ("float32", (2, 3), 1, 0, 24, mask(7))
    negative = head + b"\x20" + b"\xff" * 9 + b"\x01" + whole[len(head) :]
    assert found(negative) is None
