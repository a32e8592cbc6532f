"""Partitioned variables, saved by a hook: TensorFlow and `restore_session` read them in any cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS
from tests.frontends.graphs import partitioned

pytestmark = pytest.mark.xdist_group("ray")

tf1 = tf.compat.v1

SHAPES = {"rows": (10, 3), "columns": (3, 10), "ref": (7, 4), "bytes": (16, 8), "whole": (5, 5)}

Cut = dict[str, Any]


def saved_cut() -> Cut:
    """A partitioner of each kind."""
    return {
        "rows": tf1.fixed_size_partitioner(3),
        "columns": tf1.fixed_size_partitioner(4, axis=1),
        "ref": tf1.min_max_variable_partitioner(max_partitions=3, min_slice_size=16),
        "bytes": tf1.variable_axis_size_partitioner(max_shard_bytes=128),
        "whole": None,
    }


CUTS = {
    "as saved": saved_cut,
    "whole": lambda: dict.fromkeys(SHAPES),
    "two rows": lambda: dict.fromkeys(SHAPES, tf1.fixed_size_partitioner(2)),
    "three columns": lambda: dict.fromkeys(SHAPES, tf1.fixed_size_partitioner(3, axis=1)),
}


def build(cut: Cut, seed: float) -> dict[str, Any]:
    """The variables in the default graph, by name."""
    return {
        name: partitioned(name, seed, *shape, cut[name], use_resource=name != "ref") for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def saved(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose step 0 a hook has saved, of values that are 3 times their index."""
    folder = tmp_path_factory.mktemp("partitioned")
    RUNS.add(run_id(str(folder)))
    with tf.Graph().as_default():
        parts = build(saved_cut(), 3.0)
        counts = {name: len(list(variable)) for name, variable in parts.items() if name != "whole"}
        assert counts == {"rows": 3, "columns": 4, "ref": 3, "bytes": 4}
        tf1.train.get_or_create_global_step()
        with tf1.train.MonitoredSession(hooks=[ray_ckpt.CheckpointSaverHook(str(folder), save_steps=1)]):
            pass
    return folder


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("how", ["Saver.restore", "restore_session"])
def test_restored_in_a_cut(saved: Path, cut: str, how: str) -> None:
    with tf.Graph().as_default(), tf1.Session() as session:
        tensors = {name: tf.convert_to_tensor(variable) for name, variable in build(CUTS[cut](), 1.0).items()}
        saver = tf1.train.Saver()
        if how == "Saver.restore":
            saver.restore(session, tf.train.latest_checkpoint(str(saved)))
        else:
            assert ray_ckpt.restore_session(session, saved, saver) == 0
        for name, value in session.run(tensors).items():
            expected = np.arange(value.size).reshape(value.shape) * 3
            np.testing.assert_array_equal(value, expected, err_msg=name)


def test_readers_see_whole_tensors(saved: Path) -> None:
    listed = {name: tuple(shape) for name, shape in tf.train.list_variables(str(saved))}
    assert listed == {**SHAPES, "global_step": (), "_ray_ckpt": ()}
    arrays = ray_ckpt.load(saved)
    for name, shape in SHAPES.items():
        expected = np.arange(np.prod(shape)).reshape(shape) * 3
        np.testing.assert_array_equal(tf.train.load_variable(str(saved), name), expected)
        np.testing.assert_array_equal(arrays[name], expected)
