"""Damaged checkpoints: every changed byte is noticed, and the file and the tensor are named."""

from __future__ import annotations

import re
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ckpt.bundle import encode_piece, encode_run, index_name, merge_index
from ray_ckpt.errors import CheckpointError, DamagedError, ObjectMissingError
from ray_ckpt.restore import StoredCheckpoint, check_bytes, check_extents, open_checkpoint, read_boxes
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import METADATA_KEY, Box
from tests.restore.make import flip, grid, make_checkpoint, some_metadata, truncate

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "big": np.arange(600, dtype=np.uint16).reshape(30, 20),
    "cut": np.arange(64, dtype=np.float32).reshape(8, 8),
    "text": np.array([[b"abc", b""], [b"x" * 90, b"de"]], object),
    "scalar": np.array(3, np.int64),
}


def damaged_checkpoint(chunk_nbytes: int = 64) -> Store:
    """A checkpoint "c" with pieces of all kinds, in a store of its own."""
    store = open_store(f"memory://{uuid.uuid4().hex}")
    cuts = {"cut": grid((8, 8), (2, 2))}
    make_checkpoint(store, "c", ARRAYS, cuts, metadata=some_metadata(), chunk_nbytes=chunk_nbytes)
    return store


def pieces(stored: StoredCheckpoint) -> list[tuple[str, str, int, int]]:
    """(tensor, file, first byte, number of bytes) of all that the index names."""
    return [
        (tensor.name, stored.shard_path(piece.shard_id), piece.offset, piece.nbytes)
        for tensor in stored.index.tensors.values()
        for piece in tensor.pieces
    ]


def read_all(store: Store) -> None:
    stored = open_checkpoint(store, "c")
    wanted = [(n, Box.whole(a.shape), np.empty(a.shape, a.dtype)) for n, a in ARRAYS.items()]
    read_boxes(stored, wanted, threads=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_any_flipped_data_byte_is_found_and_named(small_units: int, data: st.DataObject) -> None:
    store = damaged_checkpoint(small_units)
    name, path, start, nbytes = data.draw(st.sampled_from(pieces(open_checkpoint(store, "c"))))
    flip(store, path, start + data.draw(st.integers(0, nbytes - 1)))
    with pytest.raises(DamagedError, match=rf"(?s){re.escape(path)}.*|{METADATA_KEY}") as caught:
        read_all(store)
    assert repr(name) in str(caught.value)
    _, damage = check_bytes(store, "c")
    assert [(found.path, found.tensor) for found in damage] == [(path, name)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_flipped_byte_in_a_part_is_found(small_units: int, data: st.DataObject) -> None:
    store = damaged_checkpoint(small_units)
    stored = open_checkpoint(store, "c")
    row = data.draw(st.integers(0, 29))
    piece = stored.tensor("big").pieces[0]
    at = data.draw(st.integers(row * 40, row * 40 + 39))
    flip(store, stored.shard_path(piece.shard_id), piece.offset + at)
    with pytest.raises(DamagedError, match=f"'big'.*crc32c .* of its 4 MiB chunk {at // small_units}, should be"):
        read_boxes(stored, [("big", Box((row, 0), (1, 20)), np.empty((1, 20), np.uint16))])
    # What lies in other chunks is still good.
    other = 29 if row < 15 else 0
    out = np.empty((1, 20), np.uint16)
    read_boxes(stored, [("big", Box((other, 0), (1, 20)), out)])
    assert np.array_equal(out, ARRAYS["big"][other : other + 1])


@settings(max_examples=150)
@given(data=st.data())
def test_any_damage_to_the_index_is_found(data: st.DataObject) -> None:
    store = damaged_checkpoint()
    nbytes = store.size("c.index")
    if data.draw(st.booleans()):
        truncate(store, "c.index", data.draw(st.integers(0, nbytes - 1)))
    else:
        flip(store, "c.index", data.draw(st.integers(0, nbytes - 1 - 40 - 8)))
    with pytest.raises(DamagedError, match=r"c\.index"):
        open_checkpoint(store, "c")
    index, damage = check_bytes(store, "c")
    assert index is None
    assert [found.path for found in damage] == ["c.index"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_truncated_shard_is_found_and_named(small_units: int, data: st.DataObject) -> None:
    store = damaged_checkpoint(small_units)
    name, path, start, nbytes = data.draw(st.sampled_from(pieces(open_checkpoint(store, "c"))))
    left = data.draw(st.integers(start, start + nbytes - 1))
    truncate(store, path, left)
    with pytest.raises(DamagedError, match=re.escape(path)):
        read_all(store)
    _, damage = check_bytes(store, "c")
    assert (path, name) in [(found.path, found.tensor) for found in damage]
    assert {found.path for found in damage} == {path}
    assert all(f"has {left} bytes" in found.text for found in damage), damage


def test_a_missing_shard_is_reported_once() -> None:
    store = damaged_checkpoint()
    store.delete("c.data-00001-of-00004")
    _, damage = check_bytes(store, "c")
    assert [(found.path, found.tensor) for found in damage] == [("c.data-00001-of-00004", "")]
    assert "is missing" in damage[0].text


def test_all_damage_is_reported() -> None:
    store = damaged_checkpoint()
    spots = {name: (path, start) for name, path, start, _ in pieces(open_checkpoint(store, "c"))}
    for name in ("big", "text", "scalar"):
        flip(store, *spots[name])
    _, damage = check_bytes(store, "c")
    assert {found.tensor for found in damage} == {"big", "text", "scalar"}


def test_a_missing_index_is_damage_to_verify_and_missing_to_open() -> None:
    store = damaged_checkpoint()
    store.delete("c.index")
    with pytest.raises(ObjectMissingError):
        open_checkpoint(store, "c")
    assert check_bytes(store, "c")[1][0].text.endswith("is missing")


def hostile(
    store: Store, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int, crc: int = 0, name: str = "w"
) -> None:
    """A checkpoint "c" whose index has a valid form but points anywhere; its one shard has 100 bytes."""
    value = encode_piece(dtype, shape, 0, offset, nbytes, crc)
    store.put(index_name("c"), merge_index([encode_run([(name.encode(), value)])], 1))
    store.put("c.data-00000-of-00001", bytes(100))


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "nbytes"),
    [
        ("uint8", (50,), 60, 50),
        ("uint8", (50,), 1 << 62, 50),
        ("uint8", (1 << 50,), 0, 1 << 50),
        ("uint8", (8 << 20,), 0, 8 << 20),
        ("string", (3,), 0, 1 << 50),
        ("string", (1 << 40,), 0, 1 << 41),
    ],
)
def test_bytes_beyond_the_file_are_damage(
    store: Store, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int
) -> None:
    hostile(store, dtype, shape, offset, nbytes)
    stored = open_checkpoint(store, "c")
    with pytest.raises(DamagedError, match=r"(?s)c\.data-00000-of-00001.*'w'.*100 bytes"):
        check_extents(stored, ["w"])
    _, damage = check_bytes(store, "c")
    assert [found.tensor for found in damage] == ["w"]


@pytest.mark.parametrize(("dtype", "nbytes"), [("uint8", 4 << 20), ("string", 1 << 50)])
def test_reading_beyond_the_file_takes_no_memory(store: Store, dtype: str, nbytes: int) -> None:
    hostile(store, dtype, (4 << 20,) if dtype == "uint8" else (3,), 0, nbytes)
    stored = open_checkpoint(store, "c")
    tensor = stored.tensor("w")
    out = np.empty(tensor.shape, object if dtype == "string" else np.uint8)
    with pytest.raises(DamagedError, match=r"(?s)c\.data-00000-of-00001.*'w'"):
        read_boxes(stored, [("w", Box.whole(tensor.shape), out)])


def test_metadata_beyond_the_file_takes_no_memory(store: Store) -> None:
    hostile(store, "string", (), 0, 1 << 50, name=METADATA_KEY)
    with pytest.raises(DamagedError, match=f"'{METADATA_KEY}' ends beyond the end of 'c.data-00000-of-00001'"):
        open_checkpoint(store, "c")


@pytest.mark.parametrize(("shape", "nbytes"), [((50,), 40), ((50,), 60), ((-1,), 50), ((50,), -50)])
def test_sizes_that_contradict_the_shape_are_damage(store: Store, shape: tuple[int, ...], nbytes: int) -> None:
    value = encode_piece("uint8", shape, 0, 0, nbytes % (1 << 64), 0)
    store.put(index_name("c"), merge_index([encode_run([(b"w", value)])], 1))
    with pytest.raises(DamagedError, match=r"c\.index.*w"):
        open_checkpoint(store, "c")


def test_an_empty_tensor_with_a_checksum_is_damage(store: Store) -> None:
    hostile(store, "uint8", (0,), 0, 0, crc=5)
    _, damage = check_bytes(store, "c")
    assert ["'w'" in found.text and "no bytes" in found.text for found in damage] == [True]


def test_metadata_of_another_form_is_damage(store: Store) -> None:
    make_checkpoint(store, "c", {METADATA_KEY: np.zeros(3)})
    with pytest.raises(DamagedError, match="should be a scalar string, is float64"):
        open_checkpoint(store, "c")


def test_a_newer_version_is_not_damage(store: Store) -> None:
    text = np.array(b'{"format_version": 99, "layout": "new"}', object)
    make_checkpoint(store, "c", {METADATA_KEY: text, "w": np.zeros(3)})
    with pytest.raises(CheckpointError, match="upgrade ray_ckpt") as caught:
        open_checkpoint(store, "c")
    assert not isinstance(caught.value, DamagedError)
    assert check_bytes(store, "c")[1] == []


def test_chunk_checksums_that_do_not_fit_are_reported_and_not_trusted(
    store: Store, small_units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.arange(200, dtype=np.uint8)
    wrong = some_metadata()
    object.__setattr__(wrong, "chunks", {0: bytes(4 * 4)})
    make_checkpoint(store, "c", {"w": array}, metadata=wrong, chunks=False)
    stored = open_checkpoint(store, "c")
    _, damage = check_bytes(store, "c")
    assert ["do not add up" in found.text for found in damage] == [True]
    with pytest.raises(DamagedError, match="chunk 0"):
        read_boxes(stored, [("w", Box((3,), (4,)), np.empty(4, np.uint8))])
    too_few = some_metadata()
    object.__setattr__(too_few, "chunks", {0: bytes(4 * 3)})
    make_checkpoint(store, "c", {"w": array}, metadata=too_few, chunks=False)
    out = np.empty(4, np.uint8)
    read_boxes(open_checkpoint(store, "c"), [("w", Box((3,), (4,)), out)])
    assert out.tolist() == [3, 4, 5, 6]
