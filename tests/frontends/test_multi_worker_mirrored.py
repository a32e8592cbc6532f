"""`MultiWorkerMirroredStrategy` on Ray Train's TensorflowTrainer: two workers save, one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS
from tests.frontends.mirrored_loop import LENGTH, train

pytest.importorskip("ray.train", reason="Ray Train is not installed")

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def run(tmp_path: Path, workers: int, steps: int) -> list[dict[str, Any]]:
    """What each worker of one start of the job noted."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    url, notes = tmp_path / "run", tmp_path / f"notes-{workers}"
    RUNS.add(run_id(str(url)))
    notes.mkdir()
    TensorflowTrainer(
        train,
        train_loop_config={"url": str(url), "notes": str(notes), "steps": steps},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    return [json.loads((notes / f"{rank}.json").read_text()) for rank in range(workers)]


def test_two_workers_save_and_one_goes_on(tmp_path: Path) -> None:
    first, second = run(tmp_path, 2, 5)
    assert [first["world"], second["world"]] == [[0, 2], [1, 2]]
    assert first["weights"] == second["weights"] != first["begun"]
    assert (first["seen"], second["seen"]) == (10, 10)
    # Plain TensorFlow, without a strategy.
    target = tf.train.Checkpoint(
        weights=tf.Variable(tf.zeros((LENGTH,))),
        seen=tf.Variable(0.0),
        mine=tf.Variable(-1),
        data=iter(tf.data.Dataset.range(100)),
    )
    newest = ray_ckpt.checkpoints(tmp_path / "run")[-1].prefix
    target.restore(f"{tmp_path}/run/{newest}").assert_consumed()
    assert target.weights.numpy().tolist() == first["weights"]
    assert (float(target.seen), int(target.mine), int(next(target.data))) == (10, 0, 5)
    (alone,) = run(tmp_path, 1, 7)
    assert (alone["world"], alone["restored"], alone["begun"]) == ([0, 1], 5, first["weights"])
    assert (alone["seen"], alone["mine"], alone["next"]) == (12, 0, 7)
