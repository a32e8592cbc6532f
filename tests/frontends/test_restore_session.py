"""A session restored by feeding gets what TensorFlow's own Saver would restore, from stores it cannot open."""

from __future__ import annotations

import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt.bundle import index_name
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import DamagedError, MismatchError, NoCheckpointError, UsageError
from ray_ckpt.frontends.tensorflow import restore
from ray_ckpt.frontends.tensorflow.saver_graph import SaverTensors
from ray_ckpt.frontends.tensorflow.variants import is_variant
from ray_ckpt.restore import open_checkpoint
from ray_ckpt.storage import open_store
from ray_ckpt.testing.servers import s3_server
from tests.cluster import RUNS
from tests.frontends.graphs import mixed, partitioned
from tests.restore.make import commit, flip

tf1 = tf.compat.v1


@pytest.fixture
def graph() -> Iterator[Any]:
    with tf.Graph().as_default() as graph:
        yield graph


def save_with_tensorflow(path: Path, step: int, seed: float) -> None:
    """A checkpoint of `mixed` by TensorFlow itself."""
    with tf.Graph().as_default(), tf1.Session() as session:
        session.run(mixed(seed))
        tf1.train.Saver().save(session, str(path / "model.ckpt"), step)


def values(session: Any, saver: Any) -> dict[str, list[Any]]:
    """What the session holds, by name, without iterators; a table's items in order."""
    tensors = [t for t in SaverTensors.of(saver.saver_def, session.graph).tensors if not is_variant(t.tensor)]
    found: dict[str, list[Any]] = {}
    for target, value in zip(tensors, session.run([t.tensor for t in tensors]), strict=True):
        plain = np.asarray(value).tolist()
        found.setdefault(target.name, []).append(sorted(plain) if target.name.startswith("table") else plain)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"sharded": True}, {"reshape": True}, {"restore_sequentially": True}],
    ids=lambda options: next(iter(options), "default"),
)
@pytest.mark.parametrize("group_nbytes", [1 << 20, 1], ids=["together", "one by one"])
def test_it_is_what_the_saver_restores(
    graph: Any, tmp_path: Path, options: dict[str, Any], group_nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "GROUP_NBYTES", group_nbytes)
    save_with_tensorflow(tmp_path, 7, 3.0)
    start = mixed(1.0)
    saver = tf1.train.Saver(**options)
    graph.finalize()
    with tf1.Session() as one, tf1.Session() as other:
        for session in (one, other):
            session.run(start)
        assert ray_ckpt.restore_session(one, tmp_path, saver) == 7
        before = values(other, saver)
        saver.restore(other, str(tmp_path / "model.ckpt-7"))
        assert values(one, saver) == values(other, saver) != before


def variables(**values: Any) -> Any:
    """A Saver of new variables that start at zero."""
    for name, like in values.items():
        tf1.get_variable(name, initializer=np.zeros_like(like), use_resource=True)
    return tf1.train.Saver()


def value(session: Any, name: str) -> Any:
    """One variable's value."""
    (variable,) = (v for v in session.graph.get_collection("variables") if v.op.name == name)
    return session.run(variable).tolist()


class Recorder(tf1.Session):  # type: ignore[misc, name-defined]
    """A session that keeps what it was fed."""

    def run(self, fetches: Any, feed_dict: Any = None, **options: Any) -> Any:
        self.fed = [*getattr(self, "fed", []), list((feed_dict or {}).values())]
        return super().run(fetches, feed_dict, **options)


def test_it_holds_a_group_of_arrays_at_a_time(graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "GROUP_NBYTES", 800)
    arrays = {f"v{i}": np.full(50, i) for i in range(5)}
    commit(open_store(tmp_path), 3, arrays)
    saver = variables(**arrays)
    with Recorder() as session:
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 3
        assert [[array.nbytes for array in fed] for fed in session.fed] == [[400, 400], [400, 400], [400]]
        # TensorFlow copies what is aligned worse.
        assert all(array.ctypes.data % 64 == 0 for fed in session.fed for array in fed)
        assert all(value(session, name) == array.tolist() for name, array in arrays.items())


@pytest.mark.parametrize("parts", [0, 1, 2, 5])
def test_partitions_in_another_cut(graph: Any, tmp_path: Path, parts: int) -> None:
    """What three partitions saved, as so many; 0: as one variable."""
    save_with_tensorflow(tmp_path, 7, 3.0)
    partitioned("rows", 0.0, 10, 3, tf1.fixed_size_partitioner(parts) if parts else None, use_resource=True)
    saver = tf1.train.Saver()
    with tf1.Session() as session:
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 7
        found = np.concatenate([session.run(v) for v in tf1.global_variables()])
    np.testing.assert_array_equal(found, np.arange(30.0).reshape(10, 3) * 3)


def test_a_saver_that_reshapes(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"v": np.arange(6.0)})
    tf1.get_variable("v", initializer=np.zeros((2, 3)), use_resource=True)
    saver = tf1.train.Saver(reshape=True)
    with tf1.Session() as session:
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 1
        assert value(session, "v") == [[0, 1, 2], [3, 4, 5]]


def test_the_state_of_iterators(graph: Any, tmp_path: Path) -> None:
    """It goes on where it was saved, beside variables of other kinds."""
    numbers = tf1.data.make_initializable_iterator(tf1.data.Dataset.range(100).shuffle(10, seed=1))
    following = numbers.get_next()
    start = [mixed(2.0), numbers.initializer]
    tf1.add_to_collection("saveable_objects", tf.data.experimental.make_saveable_from_iterator(numbers))
    saver = tf1.train.Saver()
    graph.finalize()
    with tf1.Session() as session:
        session.run(start)
        session.run(following)
        saver.save(session, str(tmp_path / "model.ckpt"), 4)
        expected = [session.run(following) for _ in range(20)]
        before = values(session, saver)
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 4
        assert [session.run(following) for _ in range(20)] == expected
        assert values(session, saver) == before


def test_the_newest_or_the_step_asked_for(graph: Any, tmp_path: Path) -> None:
    saver = variables(v=[1.0])
    with tf1.Session() as session:
        assert ray_ckpt.restore_session(session, tmp_path, saver) is None
        with pytest.raises(NoCheckpointError):
            ray_ckpt.restore_session(session, tmp_path, saver, step=1)
        for step in (1, 2):
            commit(open_store(tmp_path), step, {"v": np.array([float(step)])})
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 2
        assert value(session, "v") == [2.0]
        assert ray_ckpt.restore_session(session, tmp_path, saver, step=1) == 1
        assert value(session, "v") == [1.0]
        with pytest.raises(NoCheckpointError, match="step 3 is not in"):
            ray_ckpt.restore_session(session, tmp_path, saver, step=3)


def damage(path: Path, step: int, name: str) -> None:
    """Change a byte of a tensor."""
    store = open_store(path)
    stored = open_checkpoint(store, f"model.ckpt-{step}")
    piece = stored.tensor(name).pieces[0]
    flip(store, stored.shard_path(piece.shard_id), piece.offset)


def test_damage(graph: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a tensor that the Saver does not restore: nobody looks. Of another: the next older one, or an error."""
    for step in (1, 2):
        commit(open_store(tmp_path), step, {"v": np.array([float(step)]), "w": np.zeros(3)})
    saver = variables(v=[1.0])
    with tf1.Session() as session:
        damage(tmp_path, 2, "w")
        assert ray_ckpt.restore_session(session, tmp_path, saver) == 2
        damage(tmp_path, 2, "v")
        with caplog.at_level(logging.WARNING):
            assert ray_ckpt.restore_session(session, tmp_path, saver) == 1
        assert "step 2" in caplog.text
        assert "trying step 1" in caplog.text
        assert value(session, "v") == [1.0]
        with pytest.raises(DamagedError, match="'v'"):
            ray_ckpt.restore_session(session, tmp_path, saver, step=2)


def test_all_that_differs_is_listed_and_nothing_is_changed(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"a": np.ones(2), "b": np.ones(3), "c": np.ones(2), "weights": np.ones(2)})
    variables(a=np.zeros(2), b=np.zeros(2), c=np.zeros(2, np.float32), weight=np.zeros(2))
    partitioned("d", 1.0, 4, 3, tf1.fixed_size_partitioner(2), use_resource=True)
    saver = tf1.train.Saver()
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        with pytest.raises(MismatchError) as caught:
            ray_ckpt.restore_session(session, tmp_path, saver)
        assert value(session, "a") == [0, 0]
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "'b' has the shape (3,), the graph (2,)",
        "'c' is float64, the graph has float32",
        "'d' is not in the checkpoint",
        "'d' is not in the checkpoint",
        "'weight' is not in the checkpoint. did you mean 'weights'?",
    ]


def test_a_partition_of_another_whole(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"d": np.ones((4, 2), np.float32)})
    partitioned("d", 1.0, 4, 3, tf1.fixed_size_partitioner(2), use_resource=True)
    with (
        tf1.Session() as session,
        pytest.raises(MismatchError, match=r"'d' has the shape \(4, 2\), the graph \(4, 3\)"),
    ):
        ray_ckpt.restore_session(session, tmp_path, tf1.train.Saver())


def test_the_saver_of_the_collection(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"v": np.array([5.0])})
    saver = variables(v=[0.0])
    with tf1.Session() as session:
        with pytest.raises(RuntimeError, match=r"No items in collection savers. Please add a saver"):
            ray_ckpt.restore_session(session, tmp_path)
        graph.add_to_collection("savers", saver)
        assert ray_ckpt.restore_session(session, tmp_path) == 1
        assert value(session, "v") == [5.0]
        graph.add_to_collection("savers", saver)
        with pytest.raises(RuntimeError, match=r"More than one item in collection savers. Please indicate"):
            ray_ckpt.restore_session(session, tmp_path)


def test_in_a_monitored_session(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 9, {"global_step": np.int64(9), "v": np.array([5.0])})
    read = [tf1.train.create_global_step(), tf1.get_variable("v", initializer=np.zeros(1))]
    steps = []

    def init(scaffold: Any, session: Any) -> None:
        steps.append(ray_ckpt.restore_session(session, tmp_path, scaffold.saver))

    scaffold = tf1.train.Scaffold(init_fn=init)
    with tf1.train.MonitoredTrainingSession(scaffold=scaffold) as session:
        assert session.run(read) == [9, [5.0]]
    assert steps == [9]


def test_savers_that_cannot_be_used(graph: Any, tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"v": np.array([5.0])})
    saver = variables(v=[0.0])
    with tf1.Session() as session, pytest.raises(UsageError, match="build"):
        ray_ckpt.restore_session(session, tmp_path, tf1.train.Saver(defer_build=True))
    with tf1.Session(graph=tf.Graph()) as session, pytest.raises(UsageError, match="whose variables are gone"):
        ray_ckpt.restore_session(session, tmp_path, saver)


def test_an_empty_saver(tmp_path: Path) -> None:
    commit(open_store(tmp_path), 1, {"v": np.array([5.0])})
    with tf.Graph().as_default(), tf1.Session() as session:
        assert ray_ckpt.restore_session(session, tmp_path, tf1.train.Saver(allow_empty=True)) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_from_a_store_that_tensorflow_cannot_open(graph: Any) -> None:
    """Saved by a `Checkpointer` as the hooks do it, restored into another session."""
    start = mixed(3.0)
    saver = tf1.train.Saver(max_to_keep=1)
    saved = SaverTensors.of(saver.saver_def, graph)
    with s3_server() as server, tf1.Session() as one, tf1.Session() as other:
        url = f"{server.make_bucket(f'bucket-{uuid.uuid4().hex[:12]}')}/run"
        RUNS.add(run_id(url))
        with pytest.raises(tf.errors.UnimplementedError):
            tf.io.gfile.exists(f"{url}/{index_name('model.ckpt-5')}")
        one.run(start)
        with ray_ckpt.Checkpointer(
            url, rank=0, world_size=1, save_steps=1, storage_options=server.storage_options
        ) as checkpointer:
            checkpointer.adopt(None)
            checkpointer.save(5, saved.state(one.run(saved.fetches)))
        assert ray_ckpt.restore_session(other, url, saver, storage_options=server.storage_options) == 5
        assert values(other, saver) == values(one, saver)


def test_the_name_alone_imports_no_tensorflow() -> None:
    code = "import ray_ckpt, sys; ray_ckpt.restore_session; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
