"""The checkpoint's own description: round trip, older, newer and broken ones."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import CheckpointError, DamagedError
from ray_ckpt.metadata import Metadata, RankTree, WriterNote, decode, encode
from tests.restore.make import some_metadata

naturals = st.integers(0, 1 << 40)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
metadatas = st.builds(
    Metadata,
    step=naturals,
    attempt=texts,
    generation=naturals,
    world_size=naturals,
    time=st.floats(0, 1e12),
    trees=st.lists(st.builds(RankTree, st.lists(naturals, max_size=3).map(tuple), texts), max_size=3).map(tuple),
    kinds=st.dictionaries(texts, st.sampled_from(["jax", "tf", "int"]), max_size=3),
    chunks=st.dictionaries(naturals, st.binary(min_size=1, max_size=12), max_size=3),
    writers=st.lists(st.builds(WriterNote, naturals, texts, naturals, st.floats(0, 1e6)), max_size=3).map(tuple),
)


@given(metadatas)
def test_what_is_encoded_is_decoded(metadata: Metadata) -> None:
    assert decode(encode(metadata), "c") == metadata
    assert encode(decode(encode(metadata), "c")) == encode(metadata)


def test_only_unusual_kinds_take_space() -> None:
    metadata = Metadata(1, "a", 1, 1, 0.0, kinds={"x": "numpy", "y": "jax"})
    found = decode(encode(metadata), "c")
    assert dict(found.kinds) == {"y": "jax"}
    assert (found.kind("x"), found.kind("y"), found.kind("z")) == ("numpy", "jax", "numpy")


def test_the_tree_of_a_rank() -> None:
    metadata = Metadata(1, "a", 1, 3, 0.0, trees=(RankTree((0, 2), "A"), RankTree((1,), "B")))
    assert [metadata.tree_of(rank) for rank in range(4)] == ["A", "B", "A", None]


def test_unknown_keys_are_ignored_and_missing_lists_are_empty() -> None:
    document = json.loads(encode(some_metadata()))
    for key in ("trees", "kinds", "chunks", "writers"):
        del document[key]
    document["invented_later"] = {"a": 1}
    found = decode(json.dumps(document).encode(), "c")
    assert (found.step, found.trees, found.writers, dict(found.kinds)) == (500, (), (), {})


def test_a_newer_version_asks_for_an_upgrade() -> None:
    with pytest.raises(CheckpointError, match=r"gs://b/c.*version 2, .* up to 1: upgrade") as caught:
        decode(b'{"format_version": 2}', "gs://b/c")
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"{}",
        b'{"format_version": "x"}',
        b'{"format_version": 1}',
        encode(some_metadata()).replace(b'"step":500', b'"step":[]'),
        encode(some_metadata()).replace(b'"chunks":{}', b'"chunks":{"1":"@"}'),
        encode(some_metadata()).replace(b'"chunks":{}', b'"chunks":7'),
    ],
)
def test_anything_else_is_damage(raw: bytes) -> None:
    with pytest.raises(DamagedError, match=r"gs://b/c: its metadata is not readable"):
        decode(raw, "gs://b/c")
