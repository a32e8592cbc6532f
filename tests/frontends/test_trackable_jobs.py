"""`Checkpointer` with a `tf.train.Checkpoint` as the state."""

from __future__ import annotations

import gc
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import MismatchError, NoCheckpointError, SaveError, StateError, UsageError
from ray_ckpt.testing.servers import s3_server
from tests.cluster import RUNS

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def make(value: float = 0.0, **more: Any) -> Any:
    return tf.train.Checkpoint(w=tf.Variable([value] * 3), data=iter(tf.data.Dataset.range(100)), **more)


def job(url: Path | str, **settings: Any) -> ray_ckpt.Checkpointer:
    RUNS.add(run_id(str(url)))
    return ray_ckpt.Checkpointer(url, rank=0, world_size=1, **settings)


def newest(path: Path) -> str:
    """The path of the last commit, which the `checkpoint` file names a moment later."""
    return f"{path}/{ray_ckpt.checkpoints(path)[-1].prefix}"


def train(url: Path | str, steps: int, **settings: Any) -> Any:
    """Train up to this step; each adds the next number to ``w``."""
    state = make()
    with job(url, save_steps=2, **settings) as ckpt:
        assert ckpt.restore(state) is state
        for step in range((ckpt.restored_step or 0) + 1, steps + 1):
            state.w.assign_add([float(next(state.data))] * 3)
            ckpt.step(step, state)
    return state


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    train(tmp_path, 5)
    assert [c.step for c in ray_ckpt.checkpoints(tmp_path)] == [2, 4, 5]
    assert train(tmp_path, 8).w.numpy().tolist() == [sum(range(8))] * 3
    plain = make()
    plain.restore(newest(tmp_path)).assert_consumed()
    assert (plain.w.numpy().tolist(), int(next(plain.data))) == ([28] * 3, 8)
    older = make()
    with job(tmp_path) as ckpt:
        ckpt.restore(older, step=4)
    assert older.w.numpy().tolist() == [6] * 3


def test_structure_may_grow(tmp_path: Path) -> None:
    state = make()
    with job(tmp_path) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)
        state.more = tf.Variable(7.0)
        ckpt.save(2, state)
    target = make(more=tf.Variable(0.0))
    target.restore(newest(tmp_path)).assert_consumed()
    assert float(target.more) == 7


def test_errors(tmp_path: Path) -> None:
    with job(tmp_path) as ckpt, pytest.raises(NoCheckpointError):
        ckpt.restore(make(), missing="error")
    with job(tmp_path) as ckpt:
        ckpt.restore(make())
        ckpt.save(1, make(2.0))
    for options in ({"rename": {"a": "b"}}, {"cast": True}):
        with job(tmp_path) as ckpt, pytest.raises(UsageError, match=r"TensorFlow restores .* by itself"):
            ckpt.restore(make(), **options)
    with job(tmp_path) as ckpt, pytest.raises(MismatchError, match="pass partial=True"):
        ckpt.restore(make(more=tf.Variable(1.0)))
    with job(tmp_path) as ckpt, pytest.raises(StateError, match="Module is saved inside a checkpoint"):
        ckpt.restore(tf.Module())
    with job(tmp_path) as ckpt:
        state = ckpt.restore(make(more=tf.Variable(1.0)), partial=True)
    assert (state.w.numpy().tolist(), float(state.more)) == ([2] * 3, 1)


def test_a_step_whose_save_has_failed_is_not_silently_left_out(tmp_path: Path) -> None:
    outside = tf.Variable(0, dtype=tf.int64)
    state = make(1.0)
    with job(tmp_path) as ckpt:
        ckpt.restore(state)
        state.more = iter(tf.data.Dataset.range(5).map(lambda x: x + outside))
        with pytest.raises(StateError, match="TensorFlow cannot save an object"):
            ckpt.save(1, state)
        state.more = outside
        with pytest.raises(SaveError, match=r"the save of step 1 has failed.*; save at a later step"):
            ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait()
        ckpt.save(2, state)
    assert [c.step for c in ray_ckpt.checkpoints(tmp_path)] == [2]


def test_a_step_whose_save_has_failed_later_is_not_silently_left_out(tmp_path: Path) -> None:
    state = make(1.0)
    with job(tmp_path) as ckpt:
        ckpt.restore(state)
        for shard in range(7):
            for count in (4, 7):
                (tmp_path / f"model.ckpt-1.data-{shard:05d}-of-{count:05d}").mkdir()
        ckpt.save(1, state)
        with pytest.raises(SaveError, match="step 1 was not saved"):
            ckpt.wait()
        with pytest.raises(SaveError, match=r"the save of step 1 has failed.*; save at a later step"):
            ckpt.save(1, state)
        ckpt.save(2, state)
    assert [c.step for c in ray_ckpt.checkpoints(tmp_path)] == [2]


@pytest.mark.slow
def test_a_store_that_tensorflow_cannot_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3_server() as server:
        url = f"{server.make_bucket(f'bucket-{uuid.uuid4().hex[:12]}')}/run"
        train(url, 4, storage_options=server.storage_options)
        assert train(url, 6, storage_options=server.storage_options).w.numpy().tolist() == [15] * 3
        manager = ray_ckpt.CheckpointManager(make(), f"{url}/manager", 2, storage_options=server.storage_options)
        RUNS.add(run_id(f"{url}/manager"))
        with manager:
            assert manager.restore_or_initialize() is None
            path = manager.save()
        state = make(5.0)
        with ray_ckpt.CheckpointManager(state, f"{url}/manager", 2, storage_options=server.storage_options) as again:
            assert again.restore_or_initialize() == again.latest_checkpoint == path == f"{url}/manager/ckpt-1"
        assert state.w.numpy().tolist() == [0] * 3
    gc.collect()
    assert not list(tmp_path.glob("ray-ckpt-restore-*"))
