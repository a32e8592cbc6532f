"""String tensors, and the text of the `checkpoint` file."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle import (
    StateFile,
    content_crc,
    crc32c,
    decode_strings,
    encode_state_file,
    encode_strings,
    mask,
    parse_state_file,
)
from ray_ckpt.bundle.strings import _fixed_width
from ray_ckpt.errors import DamagedError, StateError, UsageError

NUL_FREE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_strings_round_trip(values: list[bytes]) -> None:
    raw, crc = encode_strings(values, (len(values),))
    assert decode_strings(raw, len(values)) == values
    assert content_crc("string", len(values), raw) == crc


def test_string_layout() -> None:
    raw, crc = encode_strings([b"ab", b""], (2,))
    lengths = b"\x02\0\0\0\0\0\0\0"
    inner = mask(crc32c(lengths)).to_bytes(4, "little")
    assert raw == b"\x02\x00" + inner + b"ab"
    assert crc == crc32c(lengths + inner + b"ab")


def test_lengths_above_4_gib_count_as_64_bits() -> None:
    assert _fixed_width([1, 0xFFFFFFFF, 1 << 32]).hex() == "01000000" + "ffffffff" + "0000000001000000"


def test_strings_come_in_c_order_from_any_array() -> None:
    array = np.array([["a", "b"], ["c", "ä"]], object)
    raw, _ = encode_strings(array.T, (2, 2))
    assert decode_strings(raw, 4) == [b"a", b"c", b"b", "ä".encode()]
    assert encode_strings(np.array([b"x", b"yy"]), (2,)) == encode_strings(["x", "yy"], (2,))
    assert encode_strings(np.array(b"x", object), ()) == encode_strings([b"x"], ())


@pytest.mark.parametrize("value", [1, None, bytearray(b"a"), ["a"]])
def test_element_that_is_no_string(value: object) -> None:
    with pytest.raises(StateError, match=f"element 1 is a {type(value).__name__}"):
        encode_strings([b"a", value], (2,))  # type: ignore[list-item]


def test_string_without_utf8() -> None:
    with pytest.raises(StateError, match="string 0 has no UTF-8"):
        encode_strings(["\ud800"], ())


def test_wrong_number_of_strings() -> None:
    with pytest.raises(StateError, match=r"1 strings .* \(2,\)"):
        encode_strings([b"a"], (2,))


def test_every_flipped_bit_of_strings_shows() -> None:
    raw, crc = encode_strings([b"hello", b"", b"w" * 130], (3,))
    for i in range(8 * len(raw)):
        bad = bytearray(raw)
        bad[i // 8] ^= 1 << i % 8
        with contextlib.suppress(DamagedError):
            assert content_crc("string", 3, bytes(bad)) != crc


def test_damaged_strings_say_what_is_wrong() -> None:
    raw, _ = encode_strings([b"hello", b""], (2,))
    with pytest.raises(DamagedError, match="lengths of 2 strings"):
        decode_strings(b"\4" + raw[1:], 2)
    for bad in (raw + b"x", raw[:-1]):
        with pytest.raises(DamagedError, match=f"need 11 bytes, there are {len(bad)}"):
            decode_strings(bad, 2)


def test_damaged_variants_say_what_is_wrong() -> None:
    length = (3).to_bytes(8, "little")
    crc = crc32c(length + b"abc")
    inner = mask(crc).to_bytes(4, "little")
    raw = b"\3abc" + inner
    assert content_crc("variant", 1, raw) == crc32c(inner, crc)
    for bad in (b"\3abd" + inner, raw[:-1]):
        with pytest.raises(DamagedError, match="element 0 of a variant"):
            content_crc("variant", 1, bad)
    with pytest.raises(DamagedError, match="1 variants need 8 bytes, there are 9"):
        content_crc("variant", 1, raw + b"x")


@given(st.binary(max_size=60), st.integers(0, 100))
def test_hostile_strings_are_damaged_or_strings(raw: bytes, count: int) -> None:
    for dtype in ("string", "variant"):
        try:
            content_crc(dtype, count, raw)
        except DamagedError:
            continue
        assert len(raw) >= count


@given(st.lists(NUL_FREE, min_size=1), st.data())
def test_state_file_round_trip(paths: list[str], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.floats(0, 1e12), min_size=len(paths), max_size=len(paths)))
    raw = encode_state_file(paths[-1], paths, times)
    assert raw
    assert parse_state_file(raw) == StateFile(paths[-1], tuple(paths), tuple(times))


def test_state_file_text() -> None:
    assert encode_state_file("m-2", ["m-1", "m-2"], [1.0, 2.5]) == (
        b'model_checkpoint_path: "m-2"\n'
        b'all_model_checkpoint_paths: "m-1"\n'
        b'all_model_checkpoint_paths: "m-2"\n'
        b"all_model_checkpoint_timestamps: 1.0\n"
        b"all_model_checkpoint_timestamps: 2.5\n"
    )


def test_state_file_without_a_checkpoint_round_trips() -> None:
    assert parse_state_file(encode_state_file(None, [], [])) == StateFile(None, (), ())


def test_state_file_of_others() -> None:
    raw = b"# by hand\nmodel_checkpoint_path: 'a' \"\\tb\\303\\244\" # end\nlast_preserved_timestamp: 3\n"
    assert parse_state_file(raw) == StateFile("a\tbä", (), ())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"# only a comment",
        b"\xff",
        b'model_checkpoint_path: "a"\nunknown: 1',
        b'model_checkpoint_path: "a',
        b"{",
    ],
)
def test_state_file_that_is_none(raw: bytes) -> None:
    with pytest.raises(DamagedError, match="checkpoint state file"):
        parse_state_file(raw)


@pytest.mark.parametrize(("newest", "times"), [(None, []), ("a", [1.0]), ("", [])])
def test_state_file_that_makes_no_sense(newest: str | None, times: list[float]) -> None:
    with pytest.raises(UsageError):
        encode_state_file(newest, ["a", "b"], times)
