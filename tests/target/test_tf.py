"""TensorFlow's variables and tensors as targets, and its own checkpoints as sources."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import DamagedError, MismatchError, StateError
from ray_ckpt.leaves import PerWorker
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store

from ..restore.make import flip
from .saving import restore, save

tf = pytest.importorskip("tensorflow")


def state(value: float, **more: Any) -> Any:
    return {
        "w": tf.Variable(tf.fill((2, 3), value)),
        "half": tf.Variable(tf.cast([value, 1.0], tf.bfloat16)),
        "text": tf.constant(["a", f"{value}"]),
        "n": tf.constant(int(value)),
    } | more


def plain(values: Any) -> Any:
    return {name: leaf.numpy().tolist() for name, leaf in values.items()}


def test_variables_are_assigned_in_place() -> None:
    stored = save([state(2)])
    like = state(0)
    got = restore(stored, like)
    assert got["w"] is like["w"]
    assert got["half"] is like["half"]
    assert plain(got) == plain(state(2))
    assert plain(restore(stored, None)) == plain(state(2))


def test_a_function_does_not_turn_variables_into_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    with pytest.raises(StateError, match=r"holds w, which was a tf.Variable, .*: pass a state"):
        restore(save([{"w": tf.Variable(1.0)}]), lambda: {"w": tf.Variable(0.0)})


def test_after_an_error_they_are_as_they_were() -> None:
    stored = save([state(2, last=np.arange(3.0))])
    like = state(0, last=np.zeros(2))
    with pytest.raises(MismatchError, match=r"last: expected float64\[2\], found float64\[3\]"):
        restore(stored, like)
    flip(stored.store, stored.shard_path(0), 0)
    like["last"] = np.zeros(3)
    with pytest.raises(DamagedError):
        restore(stored, like)
    assert like["w"].numpy().tolist() == [[0] * 3] * 2
    bytes_for_text = save([state(2, last=b"\xff")])
    like["last"] = ""
    with pytest.raises(MismatchError, match="last: expected text"):
        restore(bytes_for_text, like)
    assert like["w"].numpy().tolist() == [[0] * 3] * 2


def test_cast() -> None:
    like = {"w": tf.Variable([0, 0])}
    restore(save([{"w": tf.Variable([1.0, 2.0])}]), like, cast=True)
    assert like["w"].numpy().tolist() == [1, 2]
    with pytest.raises(MismatchError, match=r"w: 1.5 has no value in int32"):
        restore(save([{"w": np.array([1.5, 2.0])}]), like, cast=True)
    assert like["w"].numpy().tolist() == [1, 2]


def test_a_variable_of_each_worker() -> None:
    stored = save([{"v": PerWorker(tf.Variable(float(rank + 1)))} for rank in range(3)])
    variable = tf.Variable(0.0)
    for rule, expected in (("init", 0), ("first", 1), (lambda values, rank, world_size: sum(values), 6)):
        got = restore(stored, {"v": PerWorker(variable, rule)}, 0, 1)
        assert got["v"].value is variable
        assert variable.numpy() == expected


def test_what_tf_train_checkpoint_wrote(tmp_path: Path) -> None:
    written = tf.train.Checkpoint(w=tf.Variable([1.0, 2.0]), step=tf.Variable(7, dtype=tf.int64))
    prefix = Path(written.save(str(tmp_path / "ckpt"))).name
    stored = open_checkpoint(open_store(str(tmp_path), single_coordinator=True), prefix)
    like = {"w": tf.Variable([0.0, 0.0]), "step": 0}
    got = restore(stored, like, rename=lambda name: f"{name}/.ATTRIBUTES/VARIABLE_VALUE")
    assert got["step"] == 7
    assert like["w"].numpy().tolist() == [1, 2]
    with pytest.raises(StateError, match="was not written by ray_ckpt"):
        restore(stored, lambda: like)
