"""Values that are fetched where they lie are those of `session.run`, errors too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ray_ckpt
from ray_ckpt.coordinator import run_id
from ray_ckpt.errors import StateError
from ray_ckpt.frontends.tensorflow import fetch, variants
from ray_ckpt.frontends.tensorflow.fetch import Fetch
from ray_ckpt.frontends.tensorflow.saver_graph import SaverTensors
from ray_ckpt.leaves import Variants
from ray_ckpt.restore import open_checkpoint, read_boxes
from ray_ckpt.storage import open_store
from ray_ckpt.types import Box
from tests.cluster import RUNS
from tests.frontends.graphs import mixed

tf1 = tf.compat.v1


@pytest.fixture
def session() -> Iterator[Any]:
    with tf.Graph().as_default(), tf1.Session() as session:
        yield session


@pytest.fixture(params=[True, False], ids=["direct", "by run"])
def is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(fetch, "_api", lambda: None)
    return bool(request.param)


def test_all_kinds_of_variables(session: Any, is_direct: bool) -> None:
    start = mixed(2.0)
    tensors = SaverTensors.of(tf1.train.Saver().saver_def, session.graph).fetches
    session.run(start)
    expected = session.run(tensors)
    for tensor, value, like in zip(tensors, Fetch(session, tensors)(), expected, strict=True):
        if "lookup" in tensor.name:
            value, like = sorted(value), sorted(like)
        assert type(value) is type(like)
        assert np.asarray(value).dtype == np.asarray(like).dtype
        np.testing.assert_array_equal(value, like, err_msg=tensor.name)


@pytest.mark.parametrize("use_resource", [True, False])
def test_nothing_is_copied(session: Any, use_resource: bool) -> None:
    tf1.get_variable("v", initializer=np.arange(1000.0), use_resource=use_resource)
    tensors = SaverTensors.of(tf1.train.Saver().saver_def, session.graph).fetches
    session.run(tf1.global_variables_initializer())
    values = Fetch(session, tensors)
    (first,), (second,) = values(), values()
    assert first.ctypes.data == second.ctypes.data
    assert not first.flags.writeable


def test_an_array_outlives_its_session_and_the_next_update() -> None:
    with tf.Graph().as_default(), tf1.Session() as session:
        variable = tf1.get_variable("v", initializer=np.arange(1000.0), use_resource=True)
        more = variable.assign_add(np.ones(1000))
        session.run(tf1.global_variables_initializer())
        read = variable.read_value()
        values = Fetch(session, [read])
        (before,) = values()
        session.run(more)
        (after,) = values()
    np.testing.assert_array_equal(before, np.arange(1000.0))
    np.testing.assert_array_equal(after, np.arange(1000.0) + 1)


def test_what_was_added_to_the_graph_since(session: Any, is_direct: bool) -> None:
    first = tf.constant(1.0)
    assert Fetch(session, [first])() == [1.0]
    assert Fetch(session, [first, first + 1])() == [1.0, 2.0]


def test_errors_are_those_of_run(session: Any, is_direct: bool) -> None:
    variable = tf1.get_variable("v", initializer=1.0)
    values = Fetch(session, [variable.read_value()])
    with pytest.raises(tf.errors.FailedPreconditionError):
        values()
    session.close()
    with pytest.raises(RuntimeError, match="closed Session"):
        values()


def test_a_session_of_another_class_is_run_by_its_own_method() -> None:
    class Counting(tf1.Session):  # type: ignore[misc, name-defined]
        runs = 0

        def run(self, *arguments: Any, **options: Any) -> Any:
            self.runs += 1
            return super().run(*arguments, **options)

    with tf.Graph().as_default(), Counting() as session:
        assert Fetch(session, [tf.constant(1.0)])() == [1.0]
        assert session.runs == 1


def test_an_object_of_another_type_has_no_pointer(session: Any) -> None:
    op = tf.constant(1.0).op._c_op
    assert fetch._pointer(op, b"12TF_Operation")
    assert fetch._pointer(op, b"10TF_Session") is None
    assert fetch._pointer(object(), b"10TF_Session") is None


def test_iterators(session: Any, is_direct: bool, tmp_path: Path) -> None:
    """Their states are variants: bit for bit what TensorFlow's Saver writes at the same moment."""
    numbers = tf1.data.make_initializable_iterator(tf1.data.Dataset.range(100).shuffle(10, seed=1))
    following = numbers.get_next()
    start = mixed(2.0)
    tf1.add_to_collection("saveable_objects", tf.data.experimental.make_saveable_from_iterator(numbers))
    saver = tf1.train.Saver()
    saved = SaverTensors.of(saver.saver_def, session.graph)
    session.graph.finalize()
    session.run([start, numbers.initializer])
    session.run(following)
    state = saved.state(Fetch(session, saved.fetches)())
    saver.save(session, str(tmp_path / "model"))
    stored = open_checkpoint(open_store(tmp_path), "model")
    names = [name for name in stored.names if stored.tensor(name).dtype == "variant"]
    assert [name for name, leaf in state.items() if isinstance(leaf, Variants)] == names != []
    for name in names:
        expected = np.empty(stored.tensor(name).shape, object)
        read_boxes(stored, [(name, Box.whole(expected.shape), expected)])
        assert state[name].shape == expected.shape
        assert list(state[name].values) == expected.tolist()


def test_a_variant_that_nobody_saves(session: Any) -> None:
    with pytest.raises(StateError, match=r"'.*' is a variant that no Saver saves"):
        Fetch(session, [tf1.data.Dataset.range(3)._variant_tensor])()


@pytest.mark.parametrize("machine", ["this one", "another"])
def test_variants_of_a_remote_session(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tf1.train.Server.create_local_server()
    with tf.Graph().as_default(), tf1.Session(server.target) as session:
        numbers = tf1.data.make_initializable_iterator(tf1.data.Dataset.range(100))
        following = numbers.get_next()
        tf1.add_to_collection("saveable_objects", tf.data.experimental.make_saveable_from_iterator(numbers))
        saver = tf1.train.Saver()
        saved = SaverTensors.of(saver.saver_def, session.graph)
        session.run(numbers.initializer)
        assert session.run([following, following])
        saver.save(session, str(tmp_path / "model"))
        before = session.run(following)
        if machine == "another":
            # It has other files below the same names.
            monkeypatch.setattr(variants, "_run", lambda *_: None)
            with pytest.raises(StateError, match=r"'.*' cannot be saved: .*in a session of b'grpc://.*does not see"):
                Fetch(session, saved.fetches)()
            monkeypatch.undo()
            monkeypatch.setattr(variants, "_write", lambda *_: None)
            with pytest.raises(StateError, match=r"'.*' cannot be restored: .*in a session of b'grpc://.*does not see"):
                ray_ckpt.restore_session(session, tmp_path, saver)
        else:
            assert [type(leaf) for leaf in saved.state(Fetch(session, saved.fetches)()).values()] == [Variants]
            ray_ckpt.restore_session(session, tmp_path, saver)
            assert session.run(following) == before


def test_keys_and_values_of_a_table_come_from_one_run(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another thread fills the table between the two runs that a fetch makes."""
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1, name="other")
    more = table.insert(tf.constant(["a"]), tf.constant([1], tf.int64))
    weights = tf1.get_variable("v", initializer=1.0)
    fetches = [*table.export(), weights.read_value()]
    session.run(tf1.global_variables_initializer())
    run = fetch._Direct.run
    calls: list[int] = []

    def run_and_fill(direct: Any) -> Any:
        values = run(direct)
        session.run(more)
        calls.append(1)
        return values

    monkeypatch.setattr(fetch._Direct, "run", run_and_fill)
    keys, values, weight = Fetch(session, fetches)()
    assert calls == [1]
    assert (keys.tolist(), values.tolist(), weight) == ([b"a"], [1], 1.0)


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("ray_cluster")
def test_a_hook_holds_on_to_nothing_that_it_has_fetched(tmp_path: Path) -> None:
    """Else the next update of a variable would have to make a copy of it."""
    RUNS.add(run_id(str(tmp_path)))
    with tf.Graph().as_default():
        variable = tf1.get_variable("v", initializer=np.zeros(1000), use_resource=True)
        add = tf.raw_ops.AssignAddVariableOp(resource=variable.handle, value=tf.ones(1000, tf.float64))
        with tf.control_dependencies([add]):
            train = tf1.train.get_or_create_global_step().assign_add(1)
        read = variable.read_value()
        hook = ray_ckpt.CheckpointSaverHook(str(tmp_path), save_steps=2)
        places = set()
        with tf1.train.MonitoredSession(hooks=[hook]) as session:
            values = Fetch(session.run_step_fn(lambda step_context: step_context.session), [read])
            for _ in range(6):
                session.run(train)
                places.add(values()[0].ctypes.data)
    assert [checkpoint.step for checkpoint in ray_ckpt.checkpoints(tmp_path)] == [0, 2, 4, 6]
    assert len(places) == 1
