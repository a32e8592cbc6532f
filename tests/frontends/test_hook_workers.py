"""Workers with a session, variables and partitions of their own make one checkpoint, which TensorFlow reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tensorflow as tf
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.coordinator.find import NAMESPACE, coordinator_name
from ray_ckpt.errors import SaveError
from tests.cluster import RUNS
from tests.frontends.session_worker import SessionWorker, values
from tests.system.job import get
from tests.system.waiting import eventually

pytestmark = pytest.mark.xdist_group("ray")

tf1 = tf.compat.v1


@pytest.fixture(scope="module")
def workers(ray_cluster: Any) -> Iterator[list[Any]]:
    """Two processes on two hosts."""
    hosts = [node["NodeID"] for node in ray.nodes() if node["Alive"]][:2]
    made = [
        ray.remote(SessionWorker)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False))
        .remote()
        for host in hosts
    ]
    yield made
    for worker in made:
        ray.kill(worker)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    path = str(tmp_path / "run")
    RUNS.add(run_id(path))
    return path


def begin(workers: list[Any], folder: str, last: int, **options: Any) -> list[Any]:
    """Have all train at once."""
    return [worker.train.remote(rank, folder, last, **options) for rank, worker in enumerate(workers)]


def assert_holds(prefix: str, step: int) -> None:
    reader = tf.train.load_checkpoint(prefix)
    expected = values(step)
    assert set(reader.get_variable_to_shape_map()) == {*expected, "_ray_ckpt"}
    for name, value in expected.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value, err_msg=name)


def steps(folder: str) -> list[int]:
    return [checkpoint.step for checkpoint in ray_ckpt.checkpoints(folder)]


@pytest.fixture(scope="module")
def trained(workers: list[Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the steps 0, 2, 4 and 5 of both workers."""
    folder = str(tmp_path_factory.mktemp("trained") / "run")
    RUNS.add(run_id(folder))
    assert get(begin(workers, folder, 5, save_steps=2)) == [(0, 5), (0, 5)]
    return folder


def test_by_steps_all_save_the_same(trained: str) -> None:
    assert steps(trained) == [0, 2, 4, 5]
    for checkpoint in ray_ckpt.checkpoints(trained):
        assert checkpoint.world_size == 2
        assert_holds(f"{trained}/{checkpoint.prefix}", checkpoint.step)
    assert tf.train.latest_checkpoint(trained) == f"{trained}/model.ckpt-5"
    assert next(iter(tf.train.checkpoints_iterator(trained, timeout=0))) == f"{trained}/model.ckpt-5"


def full_graph(partitions: int) -> dict[str, Any]:
    """Everything in one graph, the table in another cut."""
    made: dict[str, Any] = {"global_step": tf1.train.get_or_create_global_step()}
    for name, value in values(0).items():
        if name != "global_step":
            partitioner = tf1.fixed_size_partitioner(partitions) if name == "table" else None
            made[name] = tf1.get_variable(name, value.shape, partitioner=partitioner)
    return made


def assert_session_holds(session: Any, variables: dict[str, Any], step: int) -> None:
    for name, value in values(step).items():
        found = session.run(tf.convert_to_tensor(variables[name]))
        np.testing.assert_array_equal(found, value, err_msg=name)


@pytest.mark.parametrize("how", ["Saver.restore", "restore_session"])
def test_one_session_restores_all_of_it(trained: str, how: str) -> None:
    with tf.Graph().as_default(), tf1.Session() as session:
        variables = full_graph(partitions=3)
        saver = tf1.train.Saver()
        if how == "Saver.restore":
            saver.restore(session, f"{trained}/model.ckpt-4")
        else:
            assert ray_ckpt.restore_session(session, trained, saver, step=4) == 4
        assert_session_holds(session, variables, 4)


def test_a_monitored_session_restores_all_of_it(trained: str) -> None:
    with tf.Graph().as_default():
        tensors = {name: tf.convert_to_tensor(variable) for name, variable in full_graph(partitions=2).items()}
        with tf1.train.MonitoredTrainingSession(
            checkpoint_dir=trained, save_checkpoint_secs=None, save_summaries_steps=None, save_summaries_secs=None
        ) as session:
            found = session.run(tensors)
    for name, value in values(5).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_first_worker_s_graph_is_imported_and_restored(trained: str) -> None:
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(f"{trained}/model.ckpt-5.meta")
        saver.restore(session, f"{trained}/model.ckpt-5")
        found = session.run({v.op.name: v for v in tf1.global_variables()})
    expected = values(5)
    np.testing.assert_array_equal(found["part"], expected["table"][:6])
    np.testing.assert_array_equal(found["own_0"], expected["own_0"])
    np.testing.assert_array_equal(found["rows_0/part_1"], expected["rows_0"][2:])


@pytest.mark.slow
def test_a_further_start_goes_on(workers: list[Any], folder: str) -> None:
    """Each session is restored by TensorFlow, from the files of both."""
    get(begin(workers, folder, 3, save_steps=2))
    assert get(begin(workers, folder, 6, save_steps=2, restore=True)) == [(3, 6), (3, 6)]
    assert steps(folder) == [0, 2, 3, 5, 6]
    for checkpoint in ray_ckpt.checkpoints(folder):
        assert_holds(f"{folder}/{checkpoint.prefix}", checkpoint.step)


def test_by_seconds_and_until_told_to_stop(workers: list[Any], folder: str) -> None:
    """The first worker's clock asks; steps are agreed on, and all stop at one."""
    running = begin(workers, folder, 10**6, save_secs=0.2)
    eventually(lambda: len(steps(folder)) >= 3, "three saves")
    coordinator = ray.get_actor(coordinator_name(folder), namespace=NAMESPACE)
    get(coordinator.request_stop.remote("the test has seen enough"))
    (_, last), (_, other_last) = get(running)
    assert last == other_last == steps(folder)[-1]
    for checkpoint in ray_ckpt.checkpoints(folder):
        assert_holds(f"{folder}/{checkpoint.prefix}", checkpoint.step)


def test_a_save_that_is_asked_for(workers: list[Any], folder: str) -> None:
    running = begin(workers, folder, 10**6, save_steps=10**6)
    eventually(lambda: steps(folder) == [0], "the first save")
    step = ray_ckpt.request_save(folder, "a test", 60.0)
    assert step in steps(folder)
    assert_holds(f"{folder}/model.ckpt-{step}", step)
    get(ray.get_actor(coordinator_name(folder), namespace=NAMESPACE).request_stop.remote("done"))
    (_, last), (_, other_last) = get(running)
    assert last == other_last == steps(folder)[-1] > step


@pytest.mark.slow
def test_a_listener_of_one_worker_stops_both(workers: list[Any], folder: str) -> None:
    first, other = workers
    running = [first.train.remote(0, folder, 10**6, save_steps=50)]
    running += [other.train.remote(1, folder, 10**6, save_steps=50, stop_at=(50,), blocking=False)]
    (_, last), (_, other_last) = get(running)
    assert last == other_last == steps(folder)[-1] > 50
    assert_holds(f"{folder}/model.ckpt-{last}", last)


@pytest.mark.slow
def test_one_name_for_two_values_is_refused(workers: list[Any], folder: str) -> None:
    """What has one name in several sessions is a replica: its values must be the same."""
    running = [w.train.remote(r, folder, 4, save_steps=2, scale=1.0 + r) for r, w in enumerate(workers)]
    for worker in running:
        with pytest.raises(SaveError, match="shared"):
            get(worker)
    assert steps(folder) == [0]
