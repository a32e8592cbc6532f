"""The index: round trips, the merge, and files that are damaged or hostile."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle import (
    DTYPE_NAMES,
    Index,
    decode_run,
    encode_partitioned,
    encode_piece,
    encode_run,
    merge_index,
    piece_key,
)
from ray_ckpt.bundle.coding import slice_key
from ray_ckpt.bundle.entry import encode_header
from ray_ckpt.bundle.schema import BundleEntryProto, BundleHeaderProto
from ray_ckpt.bundle.table import write_table
from ray_ckpt.errors import DamagedError, RayCkptError, StateError, UsageError
from ray_ckpt.types import Box
from tests.bundle.bundles import Part, cut, random_array, read_bundle, rows, same_bits, write_bundle
from tests.bundle.test_table import SORTED_PAIRS, Pairs, block_of, file_of_blocks


def sample() -> Pairs:
    """Entries of a small checkpoint of two shards: plain, partitioned, scalar, string."""
    boxes = rows((4, 3), 2)
    pairs = [
        (b"a/kernel", encode_piece("float32", (2, 3), 0, 0, 24, 0x12345678)),
        (b"a/scalar", encode_piece("int64", (), 1, 24, 8, 7)),
        (b"text", encode_piece("string", (2,), 1, 32, 20, 9)),
        (b"w", encode_partitioned("int32", (4, 3), boxes)),
    ]
    for i, box in enumerate(boxes):
        pairs.append((piece_key("w", box, (4, 3)), encode_piece("int32", (2, 3), i, 100, 24, i)))
    return sorted(pairs)


def index_of(pairs: Pairs, header: bytes = encode_header(2)) -> bytes:
    """An index of these entries, with sound checksums."""
    return write_table([(b"", header), *sorted(pairs)])


def test_parse_gives_what_was_encoded() -> None:
    index = Index.parse(merge_index([encode_run(sample())], 2))
    assert index.num_shards == 2
    assert list(index.tensors) == ["a/kernel", "a/scalar", "text", "w"]
    (piece,) = index.tensors["a/kernel"].pieces
    assert (piece.box, piece.shard_id, piece.offset) == (Box.whole((2, 3)), 0, 0)
    assert (piece.nbytes, piece.crc) == (24, 0x12345678)
    assert [piece.box for piece in index.tensors["w"].pieces] == rows((4, 3), 2)
    assert [piece.shard_id for piece in index.tensors["w"].pieces] == [0, 1]


@given(st.integers(0, 2**32), st.sampled_from(sorted(DTYPE_NAMES)), st.integers(1, 4), st.booleans())
def test_random_checkpoints_round_trip(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: str, num_shards: int, partitioned: bool
) -> None:
    rng = np.random.default_rng(seed)
    shards: list[list[Part]] = [[] for _ in range(num_shards)]
    arrays = {}
    for i in range(int(rng.integers(0, 30))):
        shape = tuple(int(n) for n in rng.integers(0, 6, int(rng.integers(0, 4))))
        name = f"{rng.bytes(2).hex()}/{i}"
        arrays[name] = random_array(rng, dtype, shape)
        splits = partitioned and shape and 0 not in shape and shape[0] > 1
        parts = cut(name, arrays[name], rows(shape, 2)) if splits else [Part.whole(name, arrays[name])]
        for part in parts:
            shards[int(rng.integers(num_shards))].append(part)
    prefix = tmp_path_factory.mktemp("bundle") / "p"
    write_bundle(prefix, shards)
    found = read_bundle(prefix)
    assert list(found) == sorted(arrays)
    assert all(same_bits(found[name][1], array) for name, array in arrays.items())


@given(SORTED_PAIRS)
def test_runs_round_trip(pairs: Pairs) -> None:
    assert decode_run(encode_run(pairs)) == pairs


def test_merge_does_not_depend_on_how_entries_are_spread() -> None:
    pairs = [(b"k%04d" % i, encode_piece("int8", (i,), 0, i, i, i)) for i in range(500)]
    expected = merge_index([encode_run(pairs)], 3)
    runs = [encode_run(pairs[i::7]) for i in range(7)]
    assert merge_index(runs, 3) == merge_index([*reversed(runs), encode_run([])], 3) == expected


def test_merge_of_nothing() -> None:
    assert Index.parse(merge_index([], 1)) == Index(1, {})


def test_key_in_two_runs_names_the_tensor() -> None:
    with pytest.raises(StateError, match="a/kernel: written twice"):
        merge_index([encode_run(sample()), encode_run([sample()[-4]])], 2)
    key = piece_key("w", Box((0, 0), (2, 3)), (4, 3))
    with pytest.raises(StateError, match=r"^w: written twice"):
        merge_index([encode_run(sample()), encode_run([(key, b"")])], 2)


def test_runs_that_are_none() -> None:
    with pytest.raises(StateError, match="a: written twice"):
        encode_run([(b"a", b""), (b"a", b"")])
    with pytest.raises(UsageError, match="not sorted: a follows b"):
        encode_run([(b"b", b""), (b"a", b"")])
    with pytest.raises(StateError, match="name is empty"):
        merge_index([encode_run([(b"", b"")])], 1)


def test_run_with_bytes_too_many_or_too_few() -> None:
    run = encode_run(sample())
    for bad in (run + b"x", run[:-1], run[:20], run[:3], b""):
        with pytest.raises(DamagedError, match="index entries"):
            decode_run(bad)


@given(st.binary(max_size=40))
def test_hostile_runs_are_damaged_or_sound(run: bytes) -> None:
    with contextlib.suppress(DamagedError):
        assert sum(len(key) + len(value) for key, value in decode_run(run)) <= len(run)


def test_every_flipped_bit_is_found_or_harmless() -> None:
    raw = merge_index([encode_run(sample())], 2)
    expected, harmless = Index.parse(raw), 0
    for i in range(8 * len(raw)):
        bad = bytearray(raw)
        bad[i // 8] ^= 1 << i % 8
        try:
            assert Index.parse(bytes(bad)) == expected
            harmless += 1
        except DamagedError:
            continue
    # Only the zeros that pad the footer's handles mean nothing.
    assert harmless <= 8 * 40


@pytest.mark.parametrize("source", ["gs://b/p.index", ""])
def test_every_truncation_is_found(source: str) -> None:
    raw = merge_index([encode_run(sample())], 2)
    for nbytes in range(len(raw)):
        with pytest.raises(DamagedError, match=f"^{source or 'checkpoint index'}: "):
            Index.parse(raw[:nbytes], source)


def parse_hostile(raw: bytes) -> None:
    with contextlib.suppress(DamagedError):
        Index.parse(raw, "hostile")


@given(st.binary(max_size=300))
def test_hostile_bytes(raw: bytes) -> None:
    parse_hostile(raw)
    parse_hostile(raw + struct.pack("<Q", 0xDB4775248B80FB57))


@given(st.dictionaries(st.binary(max_size=8), st.binary(max_size=30), max_size=5))
def test_hostile_entries_with_sound_checksums(entries: dict[bytes, bytes]) -> None:
    parse_hostile(index_of([(b"w" + key, value) for key, value in entries.items()]))


def test_mutated_entries_with_sound_checksums(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        pairs = [(b"", encode_header(2)), *sample()]
        at = rng.randrange(len(pairs))
        key, value = pairs[at]
        value = mutated(rng, value)
        key = mutated(rng, key) if rng.random() < 0.3 else key
        pairs[at] = (key, value)
        parse_hostile(write_table(sorted(dict(pairs).items())))


def test_mutated_blocks_with_sound_checksums(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        body = mutated(rng, block_of([(b"", encode_header(2)), *sample()]))
        parse_hostile(file_of_blocks([body], [0]))


def mutated(rng: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
    return bytes(out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_shards": 0}, "counts 0 data shards"),
        ({"num_shards": -3}, "counts -3 data shards"),
        ({"num_shards": 1, "endianness": 1}, "big-endian"),
        ({"num_shards": 1, "version": {"producer": 2, "min_consumer": 2}}, "needs bundle format 2"),
        ({"num_shards": 1, "version": {"producer": 2, "bad_consumers": [1]}}, "bundle format"),
    ],
)
def test_headers(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        Index.parse(index_of([], BundleHeaderProto(**fields).SerializeToString()))


def test_no_header() -> None:
    for pairs in ([], [(b"w", encode_piece("int8", (), 0, 0, 1, 0))]):
        with pytest.raises(DamagedError, match="no header"):
            Index.parse(write_table(pairs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 99}, "dtype number 99"),
        ({"dtype": 101}, "dtype number 101"),
        ({"shape": {"unknown_rank": True}}, "not one of a tensor"),
        ({"shape": {"dim": [{"size": -1}]}}, "not one of a tensor"),
        ({"shape": {"dim": [{"size": 1}] * 255}}, "not one of a tensor"),
        ({"shape": {"dim": [{"size": 1 << 62}] * 2}}, "too many elements"),
        ({"shard_id": 2}, "shard 2 of 2"),
        ({"shard_id": -1}, "shard -1 of 2"),
        ({"offset": -1}, "at -1 of shard"),
        ({"size": -8}, "-8 bytes"),
        ({"size": 23}, "takes 24 bytes, the entry says 23"),
        ({"dtype": 7, "size": 1}, "the entry says 1"),
    ],
)
def test_entries(change: dict[str, object], message: str) -> None:
    fields = {"dtype": 1, "shape": {"dim": [{"size": 2}, {"size": 3}]}, "size": 24} | change
    with pytest.raises(DamagedError, match=f"^p.index: w: .*{message}"):
        Index.parse(index_of([(b"w", BundleEntryProto(**fields).SerializeToString())]), "p.index")


def test_name_that_is_not_utf8() -> None:
    with pytest.raises(DamagedError, match="not UTF-8"):
        Index.parse(index_of([(b"\xff", sample()[2][1])]))


def full(boxes: list[Box]) -> bytes:
    return encode_partitioned("int32", (4, 3), boxes)


@pytest.mark.parametrize(
    ("listed", "stored", "message"),
    [
        (rows((4, 3), 2), rows((4, 3), 2)[:1], "listed but not stored"),
        (rows((4, 3), 2) * 2, rows((4, 3), 2), "listed twice"),
        (rows((4, 3), 2)[:1], rows((4, 3), 2), "element .* is in 0 of the slices"),
        (
            [Box((0, 0), (3, 3)), Box((2, 0), (2, 3))],
            [Box((0, 0), (3, 3)), Box((2, 0), (2, 3))],
            r"element \(2, 0\) .* is in 2 of the slices",
        ),
        ([Box((3, 0), (2, 3))], [Box((3, 0), (2, 3))], "not inside"),
        ([], rows((4, 3), 2), "does not list"),
    ],
)
def test_slices(listed: list[Box], stored: list[Box], message: str) -> None:
    pairs = [(piece_key("w", box, (4, 3)), encode_piece("int32", box.shape, 0, 0, 4 * box.size, 0)) for box in stored]
    pairs.append((b"w", full(listed) if listed else encode_piece("int32", (4, 3), 0, 0, 48, 0)))
    with pytest.raises(DamagedError, match=f"w: .*{message}"):
        Index.parse(index_of(pairs))


def test_slice_of_another_type_shape_or_rank() -> None:
    boxes = rows((4, 3), 2)
    keys = [piece_key("w", box, (4, 3)) for box in boxes]
    good = encode_piece("int32", (2, 3), 0, 0, 24, 0)
    others = [
        encode_piece("float32", (2, 3), 0, 0, 24, 0),
        encode_piece("int32", (3, 2), 0, 0, 24, 0),
        encode_partitioned("int32", (2, 3), [Box((0, 0), (1, 3))]),
    ]
    for other in others:
        with pytest.raises(DamagedError, match="another dtype or shape"):
            Index.parse(index_of([(b"w", full(boxes)), (keys[0], good), (keys[1], other)]))
    rank_1 = BundleEntryProto.FromString(full(boxes))
    del rank_1.slices[0].extent[1]
    with pytest.raises(DamagedError, match="rank 1 in a tensor of rank 2"):
        Index.parse(index_of([(b"w", rank_1.SerializeToString())]))


def test_slices_in_more_dimensions_than_tensorflow_has() -> None:
    with pytest.raises(DamagedError, match="rank 9"):
        Index.parse(index_of([(b"w", encode_partitioned("int8", (2,) * 9, rows((2,) * 9, 2)))]))


def test_slices_that_would_take_gigabytes_to_check() -> None:
    shape = (8200, *(2,) * 7)
    boxes = [Box((0,) * 8, (1,) * 8), *rows(shape, 8200)[1:]]
    pairs = [(piece_key("w", box, shape), encode_piece("int8", box.shape, 0, 0, box.size, 0)) for box in boxes]
    with pytest.raises(DamagedError, match="8200 slices in 8 dimensions are too many"):
        Index.parse(index_of([*pairs, (b"w", encode_partitioned("int8", shape, boxes))]))


def test_whole_dimensions_may_be_spelled_out() -> None:
    entry = BundleEntryProto(dtype=3, shape={"dim": [{"size": 4}, {"size": 3}]})
    pairs = []
    for start in (0, 2):
        extents = [(start, 2), (0, 3)]
        listed = entry.slices.add()
        for begin, length in extents:
            listed.extent.add(start=begin, length=length)
        pairs.append((slice_key(b"w", extents), encode_piece("int32", (2, 3), 0, 0, 24, 0)))
    index = Index.parse(index_of([*pairs, (b"w", entry.SerializeToString())]))
    assert [piece.box for piece in index.tensors["w"].pieces] == rows((4, 3), 2)


def test_errors_are_of_this_package() -> None:
    assert issubclass(DamagedError, RayCkptError)
    with pytest.raises(DamagedError, match=r"d/p.index: .*restore another checkpoint"):
        Index.parse(Path(__file__).read_bytes(), "d/p.index")
