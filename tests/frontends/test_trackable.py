"""What is saved of a `tf.train.Checkpoint` is what TensorFlow restores, judged by TensorFlow's own restore."""

from __future__ import annotations

import gc
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from ray_ckpt import trackable
from ray_ckpt.errors import DamagedError, MismatchError, StateError
from ray_ckpt.leaves import Slices, Variants
from ray_ckpt.leaves.layout import layout_of
from ray_ckpt.restore import StoredCheckpoint, open_checkpoint
from ray_ckpt.storage import open_store
from tests.restore.make import flip
from tests.target.saving import PREFIX, save

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


def saved(checkpoint: Any, url: Path | str | None = None) -> StoredCheckpoint:
    """The checkpoint that one rank makes of it."""
    return save([trackable.gather(checkpoint, 0)], url)


def variables() -> dict[str, Any]:
    return {
        "matrix": tf.Variable(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "half": tf.Variable(tf.cast([1.5, 2.5], tf.bfloat16)),
        "text": tf.Variable(["a\0", "b"]),
        "flag": tf.Variable(True),
        "empty": tf.Variable(tf.zeros((0, 3))),
        "nested": [tf.Variable(1), {"deep/er": tf.Variable(2.0)}],
    }


def model_and_optimizer() -> dict[str, Any]:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
    optimizer = keras.optimizers.Adam()
    train_once(model, optimizer)
    return {"model": model, "optimizer": optimizer}


def train_once(model: Any, optimizer: Any) -> None:
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.ones((2, 4)), training=True))
    weights = model.trainable_variables
    optimizer.apply(tape.gradient(loss, weights), weights)


def tables() -> dict[str, Any]:
    words = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    words.insert(tf.constant(["a", "b\0"]), tf.constant([1, 2], tf.int64))
    vectors = tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, [0.0, 0.0], -1, -2)
    vectors.insert(tf.constant([5], tf.int64), [[1.0, 2.0]])
    return {"words": words, "vectors": vectors}


def generators() -> dict[str, Any]:
    generator = tf.random.Generator.from_seed(7)
    generator.normal((3,))
    layer = keras.layers.Dropout(0.5, seed=5)
    layer(tf.ones((2, 2)), training=True)
    return {"generator": generator, "layer": layer}


@pytest.mark.parametrize("make", [variables, model_and_optimizer, tables, generators])
def test_tensorflow_restores_it_and_consumes_all(make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    source = tf.train.Checkpoint(**make())
    saved(source, tmp_path)
    target = tf.train.Checkpoint(**make())
    for variable in values(target):
        if variable.dtype != tf.string:
            variable.assign(tf.zeros_like(variable))
    target.restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    written = tf.train.Checkpoint(**make()).write(str(tmp_path / "tensorflow"))
    same(content(source, tmp_path / "source"), content(target, tmp_path / "target"))
    names = {name for name, _ in tf.train.list_variables(f"{tmp_path}/{PREFIX}")} - {"_ray_ckpt"}
    assert names - {name for name, _ in tf.train.list_variables(written)} == {"save_counter/.ATTRIBUTES/VARIABLE_VALUE"}


def values(checkpoint: Any) -> list[Any]:
    """The variables below a checkpoint."""
    _, *found = (x for x in checkpoint._saver._graph_view.breadth_first_traversal()[0])
    return [x for x in found if isinstance(x, tf.Variable)]


def content(checkpoint: Any, prefix: Path) -> dict[str, Any]:
    """What TensorFlow writes of it."""
    reader = tf.train.load_checkpoint(checkpoint.write(str(prefix)))
    names = sorted(set(reader.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"})
    return {name: reader.get_tensor(name) for name in names}


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        # The order of a table's items is nobody's promise.
        pair = [np.sort(x, axis=0) if "/table-" in name else x for x in (value, b[name])]
        assert np.array_equal(*pair), name


def pipeline() -> Any:
    return iter(tf.data.Dataset.range(100).shuffle(10, seed=3).map(lambda x: x * 2).batch(3).prefetch(2))


def test_an_iterator_goes_on_where_it_was(tmp_path: Path) -> None:
    source, numpy_like = pipeline(), iter(tf.data.Dataset.range(4))
    next(source), next(numpy_like)
    checkpoint = tf.train.Checkpoint(source=source, plain=numpy_like)
    state = trackable.gather(checkpoint, 0)
    assert {type(leaf) for name, leaf in state.items() if name.endswith("ITERATOR_STATE")} == {Variants}
    saved(checkpoint, tmp_path)
    expected = [next(source).numpy().tolist() for _ in range(3)]
    again, plain = pipeline(), iter(tf.data.Dataset.range(4))
    tf.train.Checkpoint(source=again, plain=plain).restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert [next(again).numpy().tolist() for _ in range(3)] == expected
    assert next(plain) == 1


def test_an_iterator_with_state_outside_is_refused() -> None:
    outside = tf.Variable(0)
    dataset = iter(tf.data.Dataset.range(5).map(lambda x: x + tf.cast(outside, tf.int64)))
    with pytest.raises(StateError, match="TensorFlow cannot save an object"):
        trackable.gather(tf.train.Checkpoint(iterator=dataset), 0)


def test_an_iterator_whose_outside_may_be_ignored(tmp_path: Path) -> None:
    options = tf.data.Options()
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    outside = tf.Variable(1, dtype=tf.int64)

    def make() -> Any:
        return iter(tf.data.Dataset.range(9).map(lambda x: x + outside).with_options(options))

    source, target = make(), make()
    next(source)
    saved(tf.train.Checkpoint(iterator=source), tmp_path)
    tf.train.Checkpoint(iterator=target).restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert int(next(target)) == 2


def test_python_state(tmp_path: Path) -> None:
    class Count(tf.train.experimental.PythonState):  # type: ignore[misc]
        value = 0

        def serialize(self) -> str:
            return str(self.value)

        def deserialize(self, text: bytes) -> None:
            self.value = int(text)

    source, target = Count(), Count()
    source.value = 12
    saved(tf.train.Checkpoint(count=source), tmp_path)
    tf.train.Checkpoint(count=target).restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert target.value == 12


@pytest.mark.parametrize(("read", "total"), [("AUTO", "ONLY_FIRST_REPLICA"), ("ON_READ", "SUM")])
def test_a_strategys_variables(tmp_path: Path, read: str, total: str) -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def make(value: float) -> Any:
        with strategy.scope():
            kind = {"synchronization": tf.VariableSynchronization[read], "aggregation": tf.VariableAggregation[total]}
            return tf.train.Checkpoint(v=tf.Variable([value], **kind))

    source = make(2.0)
    strategy.run(lambda: source.v.assign_add(tf.constant([1.0])))
    expected = content(source, tmp_path / "expected")["v/.ATTRIBUTES/VARIABLE_VALUE"]
    stored = saved(source, tmp_path)
    target = make(0.0)
    target.restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert target.v.read_value().numpy().tolist() == expected.tolist()
    # The same without a strategy.
    alone = trackable.reader(tf.train.Checkpoint(v=tf.Variable([0.0])), partial=False)(stored)()
    assert alone.v.numpy().tolist() == expected.tolist()


def test_a_keras_model_under_a_strategy(tmp_path: Path) -> None:
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    saved(tf.train.Checkpoint(model=model), tmp_path)
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    tf.train.Checkpoint(model=plain).restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), plain.get_weights(), strict=True))


def test_a_sharded_variable_becomes_slices(tmp_path: Path) -> None:
    from tensorflow.python.distribute.sharded_variable import ShardedVariable

    def make(first: list[float], second: list[float]) -> Any:
        return tf.train.Checkpoint(v=ShardedVariable([tf.Variable(first), tf.Variable(second)], name="v"))

    source = make([1.0, 2.0, 3.0], [4.0, 5.0])
    (slices,) = (leaf for leaf in trackable.gather(source, 0).values() if isinstance(leaf, Slices))
    assert [(part.global_shape, part.offset) for part in slices.parts] == [((5,), (0,)), ((5,), (3,))]
    saved(source, tmp_path)
    target = make([0.0, 0.0, 0.0], [0.0, 0.0])
    target.restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert [x.numpy().tolist() for x in target.v.variables] == [[1, 2, 3], [4, 5]]


def test_a_variable_is_not_copied_before_the_snapshot() -> None:
    variable, layer = tf.Variable(tf.zeros((1000,))), keras.layers.Dense(3)
    layer.build((4,))
    state = trackable.gather(tf.train.Checkpoint(v=variable, layer=layer), 0)
    assert state["v/.ATTRIBUTES/VARIABLE_VALUE"] is variable
    assert any(leaf is layer.kernel.value for leaf in state.values())


def test_other_ranks_bring_only_floating_point_variables() -> None:
    checkpoint = tf.train.Checkpoint(**variables(), **tables(), **generators(), iterator=pipeline())
    names = {name.split("/.ATTR")[0] for name in trackable.gather(checkpoint, 1)}
    assert names == {"matrix", "half", "empty", "nested/1/deep.Ser"}
    states = [trackable.gather(checkpoint, rank) for rank in range(3)]
    stored = save(states)
    assert set(stored.names) == set(states[0])
    assert layout_of(states[1], 1, 3)[0].fingerprint == layout_of(states[2], 2, 3)[0].fingerprint


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_a_large_variable_that_ranks_share_among_them(tmp_path: Path, dtype: Any) -> None:
    large = tf.cast(tf.reshape(tf.range(3 << 20) % 1000, (-1, 1024)), dtype)
    states = [trackable.gather(tf.train.Checkpoint(v=tf.Variable(large)), rank) for rank in range(3)]
    stored = save(states, tmp_path, cut_nbytes=1 << 20)
    pieces = len(stored.tensor("v/.ATTRIBUTES/VARIABLE_VALUE").pieces)
    # TensorFlow cannot put pieces of float16 together.
    assert pieces == 1 if dtype == tf.float16 else pieces > 1
    target = tf.train.Checkpoint(v=tf.Variable(tf.zeros_like(large)))
    target.restore(f"{tmp_path}/{PREFIX}").assert_consumed()
    assert tf.reduce_all(target.v == large)


def test_the_older_class_of_checkpoint(tmp_path: Path) -> None:
    stored = saved(tf.compat.v1.train.Checkpoint(v=tf.Variable(3.0)), tmp_path)
    target = tf.compat.v1.train.Checkpoint(v=tf.Variable(0.0))
    assert float(restored(target, stored).v) == 3


def test_what_cannot_be_saved() -> None:
    with pytest.raises(StateError, match=r"a tensorflow\S*Module is saved inside a checkpoint: make tf.train.Check"):
        trackable.gather(tf.Module(), 0)
    with pytest.raises(StateError, match="Sequential is saved inside a checkpoint"):
        trackable.gather(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]), 0)
    with tf.Graph().as_default(), pytest.raises(StateError, match="executes eagerly"):
        trackable.gather(tf.train.Checkpoint(), 0)


def test_a_saver_of_its_own_is_refused() -> None:
    from tensorflow.python.saved_model import registration

    class Own(tf.Module):  # type: ignore[misc]
        pass

    registration.register_tf_checkpoint_saver(
        name=f"own-{uuid.uuid4().hex}",
        predicate=lambda x: isinstance(x, Own),
        save_fn=lambda trackables, file_prefix: [],
        restore_fn=lambda trackables, merged_prefix: None,
    )
    with pytest.raises(StateError, match=r"Own in this tf\.train\.Checkpoint has a saver of its own"):
        trackable.gather(tf.train.Checkpoint(own=Own()), 0)


def test_another_inside_of_tensorflow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tf.train.Checkpoint(v=tf.Variable(1.0))
    monkeypatch.setattr(checkpoint._saver, "_gather_serialized_tensors", lambda: ({},))
    with pytest.raises(StateError, match=f"TensorFlow {tf.__version__} serializes .* 2.18 to 2.21"):
        trackable.gather(checkpoint, 0)
    checkpoint._saver = None
    with pytest.raises(StateError, match=f"TensorFlow {tf.__version__} serializes"):
        trackable.gather(checkpoint, 0)


# -- restoring ----------------------------------------------------------------------------------------------------


def restored(checkpoint: Any, stored: StoredCheckpoint, *, partial: bool = False) -> Any:
    return trackable.reader(checkpoint, partial=partial)(stored)()


def copies() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("ray-ckpt-restore-*"))


@pytest.mark.parametrize("on_disk", [True, False])
def test_restored_from_any_store(on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = tf.train.Checkpoint(**variables(), iterator=pipeline())
    stored = saved(source, tmp_path / "run" if on_disk else None)
    target = tf.train.Checkpoint(**variables(), iterator=pipeline())
    target.matrix.assign(tf.zeros((2, 3)))
    assert restored(target, stored) is target
    assert target.matrix.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    gc.collect()
    assert not copies()


def test_a_copy_lives_as_long_as_something_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = saved(tf.train.Checkpoint(early=tf.Variable(1.0), late=tf.Variable(2.0)))
    target = restored(tf.train.Checkpoint(early=tf.Variable(0.0)), stored)
    gc.collect()
    assert len(copies()) == 1
    target.late = tf.Variable(0.0)
    assert target.late.numpy() == 2
    gc.collect()
    assert not copies()


def test_what_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    stored = saved(tf.train.Checkpoint(v=tf.Variable([1.0, 2.0])))
    for other in (tf.Variable([0.0, 0.0, 0.0]), tf.Variable([0, 0])):
        with pytest.raises(MismatchError, match=rf"{PREFIX} does not fit this tf\.train\.Checkpoint: "):
            restored(tf.train.Checkpoint(v=other), stored)
    with pytest.raises(MismatchError, match=r"1 Python objects .* pass partial=True"):
        restored(tf.train.Checkpoint(v=tf.Variable([0.0, 0.0]), more=tf.Variable(3.0)), stored)
    target = restored(tf.train.Checkpoint(v=tf.Variable([0.0, 0.0]), more=tf.Variable(3.0)), stored, partial=True)
    assert (target.v.numpy().tolist(), target.more.numpy()) == ([1, 2], 3)
    assert "objects keep their values" in caplog.text


def test_damage_is_found_before_a_value_is_assigned() -> None:
    stored = saved(tf.train.Checkpoint(a=tf.Variable([1.0, 2.0]), b=tf.Variable([3.0, 4.0])))
    flip(stored.store, stored.shard_path(0), -1)
    target = tf.train.Checkpoint(a=tf.Variable([0.0, 0.0]), b=tf.Variable([0.0, 0.0]))
    with pytest.raises(DamagedError, match="is damaged"):
        trackable.reader(target, partial=False)(stored)
    assert (target.a.numpy().sum(), target.b.numpy().sum()) == (0, 0)


@pytest.mark.parametrize("method", ["save", "write"])
def test_what_tensorflow_wrote(tmp_path: Path, method: str) -> None:
    path = getattr(tf.train.Checkpoint(**variables()), method)(str(tmp_path / "ckpt"))
    stored = open_checkpoint(open_store(tmp_path, single_coordinator=True), Path(path).name)
    target = tf.train.Checkpoint(**variables())
    target.matrix.assign(tf.zeros((2, 3)))
    assert restored(target, stored).matrix.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(target.save_counter) == (1 if method == "save" else 0)


def test_what_has_no_object_graph(tmp_path: Path) -> None:
    fits, other = save([{"name": np.float32(3)}]), save([{"another": np.float32(3)}])
    for partial in (False, True):
        # TensorFlow goes by the variables' names then.
        assert float(restored(tf.train.Checkpoint(v=tf.Variable(0.0, name="name")), fits, partial=partial).v) == 3
    with pytest.raises(MismatchError, match=r"does not fit this tf\.train\.Checkpoint"):
        restored(tf.train.Checkpoint(v=tf.Variable(0.0, name="name")), other)
