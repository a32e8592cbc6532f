"""The codec against TensorFlow itself: both directions, every type, and byte for byte."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.bundle import (
    DTYPE_NAMES,
    UNPARTITIONABLE,
    Index,
    crc32c,
    encode_piece,
    encode_run,
    encode_state_file,
    index_name,
    merge_index,
    parse_state_file,
    shard_name,
)
from ray_ckpt.types import Box
from tests.bundle.bundles import Part, cut, random_array, read_bundle, rows, same_bits, write_bundle

tf = pytest.importorskip("tensorflow")

SHAPE = (6, 8)
HALVES = rows(SHAPE, 2)


def spec(part: Part) -> str:
    """TensorFlow's text for a slice: "6 8 0,3:-"; empty for a whole tensor."""
    if part.box.shape == part.shape:
        return ""
    extents = [
        "-" if n == extent else f"{start},{n}"
        for start, n, extent in zip(part.box.offset, part.box.shape, part.shape, strict=True)
    ]
    return " ".join(map(str, part.shape)) + " " + ":".join(extents)


def tf_write(prefix: Path, shards: Sequence[Sequence[Part]]) -> None:
    """Write with SaveV2, a shard each, and MergeV2Checkpoints."""
    pieces = [f"{prefix}_piece_{i}" for i in range(len(shards))]
    for piece, parts in zip(pieces, shards, strict=True):
        tf.raw_ops.SaveV2(
            prefix=piece,
            tensor_names=[part.name.encode() for part in parts],
            shape_and_slices=[spec(part) for part in parts],
            tensors=[tf.constant(part.array, tf.as_dtype(part_dtype(part))) for part in parts],
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=pieces, destination_prefix=str(prefix), delete_old_dirs=False)


def part_dtype(part: Part) -> str:
    return "string" if part.array.dtype == object else part.array.dtype.name


def restore(prefix: Path, name: str, dtype: str, box: str = "") -> Any:
    """RestoreV2 of one tensor or slice."""
    (value,) = tf.raw_ops.RestoreV2(
        prefix=str(prefix), tensor_names=[name], shape_and_slices=[box], dtypes=[tf.as_dtype(dtype)]
    )
    return value.numpy()


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_tensorflow_reads_whole_tensors(dtype: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {str(shape): random_array(rng, dtype, shape) for shape in [(), (0,), (3, 0, 2), (7,), (2, 3, 5)]}
    parts = [Part.whole(name, array) for name, array in arrays.items()]
    write_bundle(tmp_path / "model.ckpt-5", [parts[:2], parts[2:]])
    reader = tf.train.load_checkpoint(str(tmp_path / "model.ckpt-5"))
    for name, array in arrays.items():
        assert reader.get_variable_to_dtype_map()[name] == tf.as_dtype(dtype)
        assert reader.get_variable_to_shape_map()[name] == list(array.shape)
        assert same_bits(np.asarray(reader.get_tensor(name), array.dtype), array), name
        assert same_bits(np.asarray(restore(tmp_path / "model.ckpt-5", name, dtype), array.dtype), array), name


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_tensorflow_reads_slices(dtype: str, tmp_path: Path, seed: int) -> None:
    array = random_array(np.random.default_rng(seed), dtype, SHAPE)
    prefix = tmp_path / "p"
    write_bundle(prefix, [[part] for part in cut("ä/w", array, HALVES)])
    assert same_bits(restore(prefix, "ä/w", dtype, "6 8 3,3:-"), array[3:])
    crossing = "6 8 2,3:1,4"
    if dtype in UNPARTITIONABLE:
        with pytest.raises(Exception, match=r"not (yet )?supported|not allowed|Dtype"):
            restore(prefix, "ä/w", dtype, crossing)
    else:
        assert same_bits(restore(prefix, "ä/w", dtype, crossing), array[2:5, 1:5])
        assert same_bits(tf.train.load_checkpoint(str(prefix)).get_tensor("ä/w"), array)


def test_tensorflow_reads_slices_that_are_no_grid(tmp_path: Path, seed: int) -> None:
    array = random_array(np.random.default_rng(seed), "float32", (300, 300))
    pinwheel = [
        Box((0, 0), (100, 200)),
        Box((0, 200), (200, 100)),
        Box((200, 100), (100, 200)),
        Box((100, 0), (200, 100)),
        Box((100, 100), (100, 100)),
    ]
    write_bundle(tmp_path / "p", [[part] for part in cut("w", array, pinwheel)])
    assert same_bits(tf.train.load_checkpoint(str(tmp_path / "p")).get_tensor("w"), array)


def test_tensorflow_reads_rank_8_slices(tmp_path: Path, seed: int) -> None:
    array = random_array(np.random.default_rng(seed), "int16", (2,) * 8)
    boxes = [Box(tuple(corner), (1,) * 8) for corner in np.ndindex(array.shape)]
    write_bundle(tmp_path / "p", [cut("w", array, boxes)])
    assert same_bits(tf.train.load_checkpoint(str(tmp_path / "p")).get_tensor("w"), array)


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_we_read_what_tensorflow_wrote(dtype: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {str(shape): random_array(rng, dtype, shape) for shape in [(), (0,), (7,), (2, 3, 5)]}
    arrays["cut"] = random_array(rng, dtype, SHAPE)
    halves = cut("cut", arrays["cut"], HALVES)
    whole = [Part.whole(name, array) for name, array in arrays.items() if name != "cut"]
    tf_write(tmp_path / "p", [[*whole[:2], halves[0]], [*whole[2:], halves[1]]])
    found = read_bundle(tmp_path / "p")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name][0] == dtype
        assert same_bits(found[name][1], array), name


def test_we_read_object_based_checkpoints(tmp_path: Path) -> None:
    iterator = iter(tf.data.Dataset.range(10).shuffle(4, seed=1).batch(2))
    next(iterator)
    checkpoint = tf.train.Checkpoint(w=tf.Variable([1.5, 2.5]), text=tf.Variable(["a", "bc"]), it=iterator)
    prefix = Path(checkpoint.save(str(tmp_path / "ckpt")))
    found = read_bundle(prefix)
    assert found["w/.ATTRIBUTES/VARIABLE_VALUE"][1].tolist() == [1.5, 2.5]
    assert found["text/.ATTRIBUTES/VARIABLE_VALUE"][1].tolist() == [b"a", b"bc"]
    assert found["it/.ATTRIBUTES/ITERATOR_STATE"][0] == "variant"
    assert set(found) == set(tf.train.load_checkpoint(str(prefix)).get_variable_to_shape_map())


def test_we_read_partitioned_variables_of_a_saver(tmp_path: Path) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        v1.get_variable(
            "part",
            initializer=tf.reshape(tf.range(60.0), (10, 6)),
            partitioner=v1.fixed_size_partitioner(3, axis=0),
        )
        session.run(v1.global_variables_initializer())
        prefix = v1.train.Saver(sharded=True).save(session, str(tmp_path / "model"), global_step=3)
    found = read_bundle(Path(prefix))
    assert found["part"][1].tolist() == np.arange(60.0).reshape(10, 6).tolist()


def names(seed: int, count: int, nbytes: int) -> list[str]:
    """Random names that share some prefixes."""
    rng = np.random.default_rng(seed)
    return [f"layer_{int(rng.integers(20))}/{rng.bytes(nbytes // 2).hex()}" for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "name_nbytes"),
    [(1, 4), (16, 4), (17, 4), (40, 300), (2500, 240), (3, 600_000)],
    ids=["one", "restart", "restart+1", "varints", "blocks", "large-entries"],
)
def test_bytes_are_tensorflows(count: int, name_nbytes: int, tmp_path: Path, seed: int) -> None:
    parts = [
        Part.whole(name, np.full(i % 5, i, np.int32)) for i, name in enumerate(sorted(names(seed, count, name_nbytes)))
    ]
    shards = [shard for shard in (parts[::3], parts[1::3], parts[2::3]) if shard]
    assert_identical(tmp_path, shards)


def test_bytes_are_tensorflows_where_a_block_boundary_has_no_short_key(tmp_path: Path) -> None:
    parts = [Part.whole(f"{i:06d}{'x' * 240}", np.zeros(0, np.int8)) for i in range(3000)]
    assert_identical(tmp_path, [parts])


def test_bytes_are_tensorflows_around_the_size_of_a_block(tmp_path: Path) -> None:
    # The first name fills a block but for a few bytes, more or less.
    for nbytes in range(262144 - 50, 262144):
        names = ["a" * nbytes, "b"]
        assert_identical(tmp_path, [[Part.whole(name, np.zeros(1, np.int8)) for name in names]])
    assert read_bundle(tmp_path / "ours").keys() == set(names)


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_bytes_are_tensorflows_of_every_type(dtype: str, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuts = cut("cut/w", random_array(rng, dtype, SHAPE), HALVES)
    columns = [Box((0, 0), (6, 3)), Box((0, 3), (6, 5))]
    cuts2 = cut("b\0c", random_array(rng, dtype, SHAPE), columns)
    whole = [Part.whole(str(shape), random_array(rng, dtype, shape)) for shape in [(), (0, 3), (200,)]]
    assert_identical(tmp_path, [[*whole, cuts2[0], cuts[0]], [cuts2[1], cuts[1]]])


def test_bytes_are_tensorflows_of_random_slices(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shards: list[list[Part]] = [[], []]
    for i in range(30):
        shape = (int(rng.choice([2, 63, 64, 65, 127, 128, 129, 8191, 8192, 8193, 16384, 16385])), 3)
        array = np.zeros(shape, np.uint8)
        for shard, part in zip(shards, cut(f"w{i:02d}", array, rows(shape, 2)), strict=True):
            shard.append(part)
    assert_identical(tmp_path, shards)


def assert_identical(folder: Path, shards: Sequence[Sequence[Part]]) -> None:
    """This package and TensorFlow write the same files."""
    ours, theirs = folder / "ours", folder / "theirs"
    write_bundle(ours, shards)
    tf_write(theirs, shards)
    for i in range(len(shards)):
        a, b = (Path(shard_name(str(p), i, len(shards))).read_bytes() for p in (ours, theirs))
        assert a == b, f"shard {i}"
    a, b = (Path(index_name(str(p))).read_bytes() for p in (ours, theirs))
    assert a == b


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    prefix, offset = tmp_path / "p", (5 << 30) + 3
    values = np.array([1, 2, 3], np.int64)
    raw = values.tobytes()
    entry = encode_piece("int64", (3,), 1, offset, len(raw), crc32c(raw))
    Path(index_name(str(prefix))).write_bytes(merge_index([encode_run([(b"w", entry)])], 2))
    with Path(shard_name(str(prefix), 1, 2)).open("wb") as file:
        file.seek(offset)
        file.write(raw)
    if os.stat(shard_name(str(prefix), 1, 2)).st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no sparse files")
    assert tf.train.load_checkpoint(str(prefix)).get_tensor("w").tolist() == [1, 2, 3]
    assert read_bundle(prefix)["w"][1].tolist() == [1, 2, 3]
    assert Index.parse(Path(index_name(str(prefix))).read_bytes()).tensors["w"].pieces[0].offset == offset


def test_two_names_may_share_bytes(tmp_path: Path) -> None:
    raw = np.arange(4, dtype=np.float32).tobytes()
    entry = encode_piece("float32", (4,), 0, 0, len(raw), crc32c(raw))
    (tmp_path / "p.index").write_bytes(merge_index([encode_run([(b"a", entry), (b"b", entry)])], 1))
    Path(shard_name(str(tmp_path / "p"), 0, 1)).write_bytes(raw)
    reader = tf.train.load_checkpoint(str(tmp_path / "p"))
    assert reader.get_tensor("a").tolist() == reader.get_tensor("b").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("newest", ["model.ckpt-5", "e1-2/model.ckpt-5", 'ä "quoted" \'é-1'])
def test_tensorflow_follows_our_state_file(newest: str, tmp_path: Path) -> None:
    (tmp_path / newest).parent.mkdir(exist_ok=True)
    write_bundle(tmp_path / newest, [[Part.whole("a", np.zeros(1))]])
    (tmp_path / "checkpoint").write_bytes(encode_state_file(newest, ["old", newest], [1.5, 2.25]))
    assert tf.train.latest_checkpoint(str(tmp_path)) == str(tmp_path / newest)
    state = tf.train.get_checkpoint_state(str(tmp_path))
    assert list(state.all_model_checkpoint_paths) == [str(tmp_path / "old"), str(tmp_path / newest)]
    assert list(state.all_model_checkpoint_timestamps) == [1.5, 2.25]


def test_tensorflow_takes_our_empty_state_file_for_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(encode_state_file(None, [], []))
    assert tf.train.get_checkpoint_state(str(tmp_path)) is None
    assert tf.train.latest_checkpoint(str(tmp_path)) is None


def test_we_read_tensorflows_state_file(tmp_path: Path) -> None:
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(a=tf.Variable(1.0)), str(tmp_path), max_to_keep=2)
    for _ in range(3):
        manager.save()
    raw = (tmp_path / "checkpoint").read_bytes()
    state = parse_state_file(raw)
    assert (state.newest, state.all_paths) == ("ckpt-3", ("ckpt-2", "ckpt-3"))
    assert len(state.timestamps) == 2
