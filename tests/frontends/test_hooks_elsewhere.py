"""Hooks on a store that TensorFlow cannot open, and in a process of their own without a Ray that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook, checkpoints, request_save
from ray_ckpt.coordinator import run_id
from ray_ckpt.frontends.tensorflow.side_files import opened_by_tensorflow
from ray_ckpt.storage import open_store
from ray_ckpt.testing.servers import s3_server
from tests.cluster import RUNS
from tests.frontends.sessions import Event, Listener, driven, model, session, steps, train, weights
from tests.system.waiting import eventually, pause

tf1 = tf.compat.v1
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("fresh_tf")]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("folder", "opened"),
    [("/a/b", True), ("a", True), ("file:///a", True), ("gs://a/b", True), ("s3://a/b", False), ("weird://a", False)],
)
def test_what_tensorflow_can_open(folder: str, opened: bool) -> None:
    assert opened_by_tensorflow(folder) is opened


@pytest.mark.slow
def test_a_store_that_tensorflow_cannot_open(ray_cluster: Cluster) -> None:
    noted: list[Event] = []
    restored: list[float] = []
    with s3_server() as server:
        url = f"{server.make_bucket('hooks')}/runs/1"
        RUNS.add(run_id(url))
        for runs in (3, 2, 2):
            with tf.Graph().as_default():
                made = model()
                listeners = [Listener("A", noted)]
                options: dict[str, Any] = {"storage_options": server.storage_options, "listeners": listeners}
                hook = CheckpointSaverHook(url, save_steps=2, saver=tf1.train.Saver(max_to_keep=2), **options)
                with session(hook) as opened:
                    restored.append(float(opened.run(made.weights)[0]))
                    for _ in range(runs):
                        opened.run(made.train)

        def kept() -> list[int]:
            return [checkpoint.step for checkpoint in checkpoints(url, storage_options=server.storage_options)]

        # The Saver of each start was told of what the one before has left.
        eventually(lambda: kept() == [5, 7], "starts delete what earlier ones have saved")
        found = checkpoints(url, storage_options=server.storage_options)
        store = open_store(url, storage_options=server.storage_options)
        graph, meta = store.read("graph.pbtxt"), store.read(f"{found[-1].prefix}.meta")
        names = [info.path for info in store.list("")]
    assert restored == [0.0, 30.0, 50.0]
    assert [event[2] for event in noted if event[1] == "after"] == [0, 2, 3, 3, 5, 5, 7]
    assert found[-1].step == 7
    assert b'name: "weights"' in graph
    assert tf1.MetaGraphDef.FromString(meta).saver_def.restore_op_name
    assert not [name for name in names if "tfevents" in name]


def test_a_request_from_outside_is_saved_and_told(ray_cluster: Cluster, folder: str) -> None:
    """`ray-ckpt save` while training goes on: at a step that lies ahead."""
    from concurrent.futures import ThreadPoolExecutor

    noted: list[Event] = []
    hook = AsyncCheckpointSaverHook(folder, save_steps=10**6, listeners=[Listener("A", noted)])
    with driven(hook) as driver, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(request_save, folder, "by a test", 60.0)

        def trained() -> bool:
            driver.run(1)
            pause(0.01)
            return asked.done()

        eventually(trained, "the save is committed", every_s=0.0)
        step = asked.result()
        assert step > 0
        assert ("A", "before", step) in noted
    assert ("A", "after", step) in noted
    assert weights(folder, step) == (step, 10.0 * step)


@pytest.mark.slow  # Coordinators stay for a minute.
@pytest.mark.parametrize("ends", ["well", "by an exception"])
def test_nothing_is_left_of_a_job(ray_cluster: Cluster, folder: str, ends: str) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    if ends == "well":
        train(hook, 2)
    else:
        with pytest.raises(tf.errors.InvalidArgumentError):
            broken(hook)
        assert own_threads()
        hook._settle_unended()
    assert own_threads() == []

    def actors() -> list[str]:
        return [actor["name"] for actor in list_named_actors(True) if run_id(folder) in actor["name"]]

    eventually(lambda: actors() == [], "coordinator and agent have ended", timeout_s=150)
    assert weights(folder) == (2, 20.0)


def broken(hook: Any) -> None:
    """A job whose third run fails in TensorFlow."""
    made = model()
    wrong = tf.debugging.assert_less(made.step.read_value(), tf.constant(2, tf.int64))
    with session(hook) as opened:
        opened.run(made.train)
        opened.run(made.train)
        opened.run(wrong)


def own_threads() -> list[str]:
    """Threads of this package."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ray-ckpt")]


JOB = """
import sys, ray, tensorflow as tf
from ray_ckpt import AsyncCheckpointSaverHook
from tests.frontends.sessions import Do, model, session

def fail(_):
    raise KeyError("training failed")

with tf.Graph().as_default():
    made = model()
    assert not ray.is_initialized()
    with session(AsyncCheckpointSaverHook(sys.argv[1], save_steps=3), Do(fail, before=(5,))) as opened:
        assert ray.is_initialized()
        while True:
            opened.run(made.train)
"""


@pytest.mark.slow
def test_a_process_without_ray_starts_its_own_and_finishes_its_saves_when_it_fails(folder: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", JOB, folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert "KeyError: 'training failed'" in done.stderr, done.stderr
    assert steps(folder) == [0, 3]
    assert weights(folder) == (3, 30.0)
    assert os.path.exists(os.path.join(folder, "model.ckpt-3.meta"))
