"""What plain TensorFlow wrote is read like our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.catalog import checkpoints, load, verify
from ray_ckpt.errors import DamagedError
from ray_ckpt.restore import open_checkpoint, read_boxes
from ray_ckpt.storage import open_store
from ray_ckpt.types import Box
from tests.restore.make import flip, random_bits, same_bits

tf = pytest.importorskip("tensorflow")


def save_v2(prefix: Path, arrays: dict[str, np.ndarray[Any, Any]], slices: dict[str, str]) -> None:
    """One SaveV2 and one MergeV2Checkpoints, as a Saver does; a tensor may come in slices of itself."""
    names, specs, tensors = [], [], []
    for name, array in arrays.items():
        names.append(name.partition("@")[0])
        specs.append(slices.get(name, ""))
        tensors.append(tf.constant(array))
    part = f"{prefix}_temp/part"
    tf.raw_ops.SaveV2(prefix=part, tensor_names=names, shape_and_slices=specs, tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[part], destination_prefix=str(prefix))
    prefix.parent.joinpath("checkpoint").write_text(f'model_checkpoint_path: "{prefix.name}"\n')


def test_plain_partitioned_and_string_tensors(tmp_path: Path, seed: int) -> None:
    whole = random_bits(np.dtype(np.float32), (6, 8), seed)
    large = random_bits(np.dtype(np.float64), (500, 700), seed)
    text = np.array([[b"", b"x" * 300], [b"\xff\x00", b"yes"]], object)
    half = random_bits(np.dtype(tf.bfloat16.as_numpy_dtype), (3,), seed)
    arrays = {"w@0": whole[:2], "w@1": whole[2:], "large": large, "text": text, "half": half}
    save_v2(tmp_path / "model.ckpt-7", arrays, {"w@0": "6 8 0,2:-", "w@1": "6 8 2,4:-"})
    found = load(tmp_path)
    expected = {"w": whole, "large": large, "text": text, "half": half}
    assert sorted(found) == sorted(expected)
    assert all(same_bits(found[name], array) for name, array in expected.items())
    out = np.empty((10, 5))
    box = Box((100, 3), (10, 5))
    read_boxes(open_checkpoint(open_store(tmp_path), "model.ckpt-7"), [("large", box, out)])
    assert same_bits(out, large[box.slices])
    assert [(info.step, info.foreign) for info in checkpoints(tmp_path)] == [(7, True)]


def test_an_object_based_checkpoint_with_an_iterator(tmp_path: Path) -> None:
    iterator = iter(tf.data.Dataset.range(10).batch(2))
    next(iterator)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(w=tf.Variable(tf.range(5.0)), iterator=iterator), str(tmp_path), max_to_keep=3
    )
    for step in (1, 2):
        manager.save(checkpoint_number=step)
    found = load(tmp_path)
    assert found["w/.ATTRIBUTES/VARIABLE_VALUE"].tolist() == [0, 1, 2, 3, 4]
    assert {type(element) for element in found["iterator/.ATTRIBUTES/ITERATOR_STATE"]} == {bytes}
    assert [(report.step, report.ok) for report in verify(tmp_path)] == [(1, True), (2, True)]


def test_damage_is_found_in_every_byte(tmp_path: Path, seed: int) -> None:
    arrays = {"w": np.arange(6, dtype=np.float32), "text": np.array([b"ab", b"c"], object)}
    save_v2(tmp_path / "model.ckpt-7", arrays, {})
    store = open_store(tmp_path)
    path = "model.ckpt-7.data-00000-of-00001"
    for at in range(store.size(path)):
        flip(store, path, at)
        with pytest.raises(DamagedError, match=path):
            load(tmp_path)
        assert not verify(tmp_path)[0].ok
        flip(store, path, at)
    assert verify(tmp_path)[0].ok
