"""Variant tensors, the states of TensorFlow's iterators, saved without TensorFlow and read by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.bundle import Index, Piece, content_crc, decode_objects, encode_objects, index_name, shard_name
from ray_ckpt.errors import DamagedError, MismatchError, StateError
from ray_ckpt.leaves import Variants
from ray_ckpt.restore import check_bytes, open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.tree import Named

from ..restore.make import flip
from .saving import PREFIX, restore, save

tf: Any = pytest.importorskip("tensorflow")

STATE = "it/.ATTRIBUTES/ITERATOR_STATE"


def _dataset() -> Any:
    return tf.data.Dataset.range(40).shuffle(8, seed=3).batch(2)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[int]]:
    """A checkpoint of an iterator that TensorFlow wrote, and what the iterator gives next."""
    iterator = iter(_dataset())
    next(iterator)
    prefix = tf.train.Checkpoint(it=iterator).write(str(tmp_path_factory.mktemp("theirs") / "ckpt"))
    return prefix, next(iterator).numpy().tolist()


def _stored(prefix: str, name: str) -> tuple[Piece, bytes]:
    """The only piece of a tensor and its bytes."""
    index = Index.parse(Path(index_name(prefix)).read_bytes())
    (piece,) = index.tensors[name].pieces
    raw = Path(shard_name(prefix, piece.shard_id, index.num_shards)).read_bytes()
    return piece, raw[piece.offset : piece.offset + piece.nbytes]


def _variants(piece: Piece, raw: bytes) -> Variants:
    return Variants(decode_objects("variant", raw, piece.box.size), piece.box.shape)


def test_bytes_and_checksum_are_those_that_tensorflow_writes(theirs: tuple[str, list[int]]) -> None:
    piece, raw = _stored(theirs[0], STATE)
    values = decode_objects("variant", raw, piece.box.size)
    assert encode_objects("variant", values, piece.box.shape) == (raw, piece.crc)


def test_the_elements_are_those_of_a_serialized_tensor(theirs: tuple[str, list[int]]) -> None:
    piece, raw = _stored(theirs[0], STATE)
    (state,) = tf.raw_ops.RestoreV2(prefix=theirs[0], tensor_names=[STATE], shape_and_slices=[""], dtypes=[tf.variant])
    elements = decode_objects("variant", raw, piece.box.size)
    assert len(elements) > 1
    assert tf.io.serialize_tensor(state).numpy().endswith(b"".join(elements))


def test_tensorflow_goes_on_from_a_state_that_we_wrote(tmp_path: Path, theirs: tuple[str, list[int]]) -> None:
    prefix, following = theirs
    piece, raw = _stored(prefix, STATE)
    graph = tf.train.load_checkpoint(prefix).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    state = Named({STATE: _variants(piece, raw), "_CHECKPOINTABLE_OBJECT_GRAPH": graph})
    save([state], tmp_path)
    ours = str(tmp_path / PREFIX)
    mine, written = _stored(ours, STATE)
    assert (written, mine.crc, mine.box) == (raw, piece.crc, piece.box)
    (found,) = tf.raw_ops.RestoreV2(prefix=ours, tensor_names=[STATE], shape_and_slices=[""], dtypes=[tf.variant])
    assert found.dtype == tf.variant
    iterator = iter(_dataset())
    tf.train.Checkpoint(it=iterator).read(ours).assert_consumed()
    assert next(iterator).numpy().tolist() == following


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_they_come_back_from_any_target(shape: tuple[int, ...]) -> None:
    value = Variants([b"x" * i for i in range(int(np.prod(shape)))], shape)
    stored = save([{"it": value, "text": "t"}])
    like = Variants([b""])
    assert restore(stored, {"it": like, "text": ""}) == {"it": value, "text": "t"}
    assert restore(stored, None)["it"] == value
    assert check_bytes(stored.store, PREFIX)[1] == []


def test_a_checkpoint_of_tensorflow_gives_them_too(theirs: tuple[str, list[int]]) -> None:
    stored = open_checkpoint(open_store(Path(theirs[0]).parent), "ckpt")
    found = restore(stored, Named({STATE: Variants([b""])}), partial=True)
    assert found[STATE] == _variants(*_stored(theirs[0], STATE))


def test_they_are_no_strings() -> None:
    stored = save([{"it": Variants([b"x"])}])
    with pytest.raises(MismatchError, match=r"it: expected string\[\], found variant\[\]"):
        restore(stored, {"it": b""}, cast=True)


def test_every_flipped_byte_shows() -> None:
    raw, crc = encode_objects("variant", [b"hello", b"", b"w" * 130], (3,))
    for i in range(8 * len(raw)):
        bad = bytearray(raw)
        bad[i // 8] ^= 1 << i % 8
        try:
            assert content_crc("variant", 3, bytes(bad)) != crc
        except DamagedError:
            continue
    stored = save([{"it": Variants([b"hello"])}])
    flip(stored.store, stored.shard_path(0), 3)
    with pytest.raises(DamagedError, match="element 0 of a variant"):
        restore(stored, None)


def test_only_bytes_that_fill_the_shape_are_written() -> None:
    with pytest.raises(StateError, match=r"1 variants do not fill a tensor of shape \(2,\)"):
        encode_objects("variant", [b"a"], (2,))
    with pytest.raises(StateError, match="element 1 is a str"):
        encode_objects("variant", [b"a", "b"], (2,))


def test_one_rank_may_hold_them_and_their_number_may_change() -> None:
    for count in (3, 0, 5):
        value = Variants([b"x"] * count, (count,))
        stored = save([Named({"w": np.zeros(3), "it": value}), Named({"w": np.zeros(3)})])
        assert stored.tensor("it").shape == (count,)
        assert restore(stored, Named({"w": np.ones(3), "it": Variants([b""])}), 0, 2)["it"] == value
