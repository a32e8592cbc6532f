"""Checksums, integers, keys, dtypes and file names."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle import (
    DTYPE_NAMES,
    UNPARTITIONABLE,
    VARIANT,
    combine,
    crc32c,
    dtype_name,
    dtype_of,
    index_name,
    mask,
    nbytes_of,
    parse_index_name,
    parse_shard_name,
    piece_key,
    shard_name,
    unmask,
)
from ray_ckpt.bundle.coding import key_name, ordered_signed, ordered_string, read_varint, slice_key, varint
from ray_ckpt.errors import DamagedError, StateError, UsageError
from ray_ckpt.types import Box

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def test_crc32c_of_known_bytes() -> None:
    # RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_takes_any_contiguous_buffer() -> None:
    array = np.arange(100_000, dtype=np.int32)
    expected = crc32c(array.tobytes())
    assert crc32c(array) == crc32c(memoryview(array)) == crc32c(bytearray(array.tobytes())) == expected
    assert crc32c(array[500:], crc32c(array[:500])) == expected


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_the_crc_of_the_concatenation(a: bytes, b: bytes) -> None:
    assert combine(crc32c(a), crc32c(b), len(b)) == crc32c(a + b)


def test_combine_of_large_parts() -> None:
    a, b = b"tensor" * 1000, bytes(range(256)) * (1 << 14) + b"x"
    assert combine(crc32c(a), crc32c(b), len(b)) == crc32c(a + b)


@given(st.integers(0, 0xFFFFFFFF))
def test_mask_has_an_inverse_and_changes_every_crc_it_should(crc: int) -> None:
    assert unmask(mask(crc)) == crc
    assert 0 <= mask(crc) <= 0xFFFFFFFF


def test_mask_of_a_known_crc() -> None:
    assert mask(0) == 0xA282EAD8
    assert mask(0x8A9136AA) == (0x6D551522 + 0xA282EAD8) & 0xFFFFFFFF


@given(st.integers(0, (1 << 64) - 1), st.binary(max_size=3), st.binary(max_size=3))
def test_varint_round_trip(value: int, before: bytes, after: bytes) -> None:
    raw = before + varint(value) + after
    assert read_varint(raw, len(before)) == (value, len(raw) - len(after))


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\xff" * 9, b"\xff" * 9 + b"\x02", b"\x80" * 10 + b"\x01"])
def test_varint_that_is_none(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="varint"):
        read_varint(raw, 0)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "80"),
        (-1, "7f"),
        (63, "bf"),
        (64, "c040"),
        (-64, "40"),
        (-65, "3fbf"),
        (8191, "dfff"),
        (8192, "e02000"),
    ],
)
def test_ordered_code_of_known_integers(value: int, code: str) -> None:
    assert ordered_signed(value).hex() == code


@given(INT64, INT64)
def test_ordered_code_sorts_like_the_integers(a: int, b: int) -> None:
    assert (ordered_signed(a) < ordered_signed(b)) == (a < b)


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_ordered_code_sorts_like_the_strings(a: bytes, b: bytes) -> None:
    assert (ordered_string(a) < ordered_string(b)) == (a < b)


@given(st.text(min_size=1).filter(lambda name: not name.startswith("\0")), st.lists(st.tuples(INT64, INT64)))
def test_a_key_gives_its_name_back(name: str, extents: list[tuple[int, int]]) -> None:
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return
    assert key_name(slice_key(encoded, extents)) == name
    assert key_name(encoded) == name


def test_piece_key() -> None:
    assert piece_key("w", Box((0, 0), (4, 8)), (4, 8)) == b"w"
    assert piece_key("s", Box((), ()), ()) == b"s"
    key = piece_key("w", Box((2, 0), (2, 8)), (4, 8))
    assert key == b"\x00w\x00\x01" + b"\x01\x02" + b"\x82\x82" + b"\x80\x7f"


@pytest.mark.parametrize("name", sorted(DTYPE_NAMES))
def test_dtype_names_round_trip(name: str) -> None:
    dtype = dtype_of(name)
    assert dtype_name(dtype) == name
    assert nbytes_of(name, 3) == (None if name == "string" else 3 * dtype.itemsize)


@pytest.mark.parametrize("dtype", ["S3", "U7", "O"])
def test_all_text_is_string(dtype: str) -> None:
    assert dtype_name(np.dtype(dtype)) == "string"


def test_big_endian_has_the_same_name() -> None:
    assert dtype_name(np.dtype(">f4")) == "float32"


@pytest.mark.parametrize("dtype", ["M8[s]", "m8[s]", "V3", "longdouble", "i4,f4"])
def test_dtype_that_tensorflow_lacks(dtype: str) -> None:
    with pytest.raises(StateError, match="cannot be stored"):
        dtype_name(np.dtype(dtype))


@pytest.mark.parametrize("name", ["float31", "", "resource", "float8_e4m3"])
def test_name_of_no_dtype(name: str) -> None:
    with pytest.raises(StateError, match="expected one of bfloat16"):
        dtype_of(name)


def test_unpartitionable_types_are_types() -> None:
    assert DTYPE_NAMES | {VARIANT} > UNPARTITIONABLE


def test_file_names() -> None:
    assert index_name("d/model.ckpt-500") == "d/model.ckpt-500.index"
    assert shard_name("d/model.ckpt-500", 3, 13) == "d/model.ckpt-500.data-00003-of-00013"
    assert shard_name("p", 123456, 123457) == "p.data-123456-of-123457"


@pytest.mark.parametrize("shard_id", [-1, 13])
def test_shard_that_is_none(shard_id: int) -> None:
    with pytest.raises(UsageError, match="13 shards"):
        shard_name("p", shard_id, 13)


@given(st.text(), st.integers(1, 10**7), st.data())
def test_file_names_round_trip(prefix: str, num_shards: int, data: st.DataObject) -> None:
    shard_id = data.draw(st.integers(0, num_shards - 1))
    assert parse_shard_name(shard_name(prefix, shard_id, num_shards)) == (prefix, shard_id, num_shards)
    assert parse_index_name(index_name(prefix)) == prefix


@pytest.mark.parametrize(
    "path",
    [
        "p.index",
        "p.data-00003-of-00003",
        "p.data-3-of-5",
        "p.data-000003-of-000005",
        "p.data-00000-of-00001.tmp",
    ],
)
def test_path_of_no_shard(path: str) -> None:
    assert parse_shard_name(path) is None


def test_path_of_no_index() -> None:
    assert parse_index_name("p.data-00000-of-00001") is None


def test_a_scalar_fills_one_element() -> None:
    assert nbytes_of("int4", math.prod(())) == 1
