"""What `SaverTensors` reads from a graph is what TensorFlow's own Saver writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from ray_ckpt.bundle.slice_spec import parse_slice_spec
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.frontends.tensorflow.saver_graph import RestoreTensors, SaverTensors
from ray_ckpt.leaves import Slice, Slices
from ray_ckpt.types import Box
from tests.frontends.graphs import mixed

tf1 = tf.compat.v1


@pytest.fixture
def graph() -> Iterator[Any]:
    with tf.Graph().as_default() as graph:
        yield graph


def whole(leaf: Any) -> Any:
    """The full array that a leaf, or the parts of one, fill."""
    if not isinstance(leaf, (Slice, Slices)):
        return leaf
    parts = leaf.parts if isinstance(leaf, Slices) else (leaf,)
    array = np.full(parts[0].global_shape, -1, parts[0].array.dtype)
    for part in parts:
        array[Box(part.offset, part.array.shape).slices] = part.array
    return array


def assert_state_is_what_tensorflow_saves(session: Any, saver: Any, path: Path) -> None:
    saved = SaverTensors.of(saver.as_saver_def(), session.graph)
    state = saved.state(session.run(saved.fetches))
    reader = tf.train.load_checkpoint(saver.save(session, str(path / "tf"), write_meta_graph=False))
    shapes = reader.get_variable_to_shape_map()
    assert sorted(state) == sorted(shapes)
    for name in shapes:
        expected, found = reader.get_tensor(name), whole(state[name])
        if isinstance(expected, bytes):
            assert found.shape == ()
            assert found.item() == expected
        else:
            assert found.dtype == np.asarray(expected).dtype, name
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [{}, {"sharded": True}, {"reshape": True}, {"restore_sequentially": True}, {"name": "other"}],
    ids=lambda options: next(iter(options), "default"),
)
def test_all_kinds_of_variables_are_as_tensorflow_saves_them(
    graph: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    start = mixed()
    saver = tf1.train.Saver(**options)
    graph.finalize()
    with tf1.Session() as session:
        session.run(start)
        assert_state_is_what_tensorflow_saves(session, saver, tmp_path)


def test_a_saver_with_one_op_a_device(graph: Any, tmp_path: Path) -> None:
    with tf.device("/cpu:0"):
        tf1.get_variable("first", initializer=[1.0, 2.0])
    with tf.device("/cpu:1"):
        tf1.get_variable("second", initializer=[3, 4])
    saver = tf1.train.Saver(sharded=True)
    assert len([op for op in graph.get_operations() if op.type == "SaveV2"]) == 2
    with tf1.Session(config=tf1.ConfigProto(device_count={"CPU": 2})) as session:
        session.run(tf1.global_variables_initializer())
        assert_state_is_what_tensorflow_saves(session, saver, tmp_path)


def test_names_of_a_var_list(graph: Any, tmp_path: Path) -> None:
    first = tf1.get_variable("first", initializer=[1.0, 2.0])
    rows = tf1.get_variable("rows", (4, 2), partitioner=tf1.fixed_size_partitioner(2))
    tf1.get_variable("third", initializer=7)
    saver = tf1.train.Saver({"renamed/first": first, "renamed/rows": rows})
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        assert_state_is_what_tensorflow_saves(session, saver, tmp_path)
        saved = SaverTensors.of(saver.saver_def, graph)
        assert [found.name for found in saved.tensors] == ["renamed/first", "renamed/rows", "renamed/rows"]


def test_a_slice_by_save_slice_info(graph: Any, tmp_path: Path) -> None:
    """A worker that holds only its part of a larger variable."""
    part = tf1.get_variable("part", initializer=np.ones((2, 3), np.float32))
    part._set_save_slice_info(tf1.Variable.SaveSliceInfo("table", [6, 3], [2, 0], [2, 3]))
    saved = SaverTensors.of(tf1.train.Saver().saver_def, graph)
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        (leaf,) = saved.state(session.run(saved.fetches)).values()
    assert (leaf.global_shape, leaf.offset, leaf.array.shape) == ((6, 3), (2, 0), (2, 3))


@pytest.mark.parametrize("sharded", [False, True])
def test_an_imported_graph(graph: Any, tmp_path: Path, sharded: bool) -> None:
    start = mixed()
    meta = tf1.train.export_meta_graph(saver_def=tf1.train.Saver(sharded=sharded).saver_def, clear_devices=True)
    with tf.Graph().as_default() as other, tf1.Session() as session:
        saver = tf1.train.import_meta_graph(meta)
        other.finalize()
        session.run(start.name)
        assert_state_is_what_tensorflow_saves(session, saver, tmp_path)


def test_a_graph_imported_below_a_scope(graph: Any, tmp_path: Path) -> None:
    tf1.get_variable("first", initializer=[1.0, 2.0])
    meta = tf1.train.export_meta_graph(saver_def=tf1.train.Saver().saver_def)
    with tf.Graph().as_default(), tf1.Session() as session:
        saver = tf1.train.import_meta_graph(meta, import_scope="below")
        session.run(tf1.global_variables_initializer())
        assert_state_is_what_tensorflow_saves(session, saver, tmp_path)


def test_only_what_the_saver_saves_is_found(graph: Any) -> None:
    first = tf1.get_variable("first", initializer=1.0)
    second = tf1.get_variable("second", initializer=2.0)
    one, two = tf1.train.Saver([first]), tf1.train.Saver([second])
    for saver, name in ((one, "first"), (two, "second")):
        assert [found.name for found in SaverTensors.of(saver.saver_def, graph).tensors] == [name]
        assert [found.name for found in RestoreTensors.of(saver.saver_def, graph).tensors] == [name]


def test_an_empty_saver(graph: Any) -> None:
    saver = tf1.train.Saver(allow_empty=True)
    saved = SaverTensors.of(saver.saver_def, graph)
    assert saved.is_empty
    assert saved.state([]) == {}


def test_restored_tensors_are_the_saved_ones(graph: Any) -> None:
    mixed()
    saver_def = tf1.train.Saver(sharded=True).saver_def
    saved, restored = SaverTensors.of(saver_def, graph), RestoreTensors.of(saver_def, graph)
    assert restored.op.name == saver_def.restore_op_name
    assert {(t.name, t.part) for t in restored.tensors} == {(t.name, t.part) for t in saved.tensors}
    assert {t.tensor.op.type for t in restored.tensors} == {"RestoreV2"}


def test_the_old_format_is_refused(graph: Any) -> None:
    tf1.get_variable("first", initializer=1.0)
    saver_def = tf1.train.Saver(write_version=tf1.train.SaverDef.V1).saver_def
    with pytest.raises(UsageError, match=r"old format \(V1\).*SaverDef.V2"):
        SaverTensors.of(saver_def, graph)


def test_a_saver_whose_variables_are_gone(graph: Any) -> None:
    tf1.get_variable("first", initializer=1.0)
    saver_def = tf1.train.Saver().saver_def
    with tf.Graph().as_default() as other:
        for read in (SaverTensors.of, RestoreTensors.of):
            with pytest.raises(UsageError, match=r"'save/.*is not in the graph.*whose variables are gone"):
                read(saver_def, other)


def test_a_saver_of_something_else_is_refused(graph: Any) -> None:
    tf1.get_variable("first", initializer=1.0)
    saver_def = tf1.train.Saver().saver_def
    saver_def.save_tensor_name = "first/Assign:0"
    with pytest.raises(UsageError, match="no SaveV2 op lies before 'first/Assign'"):
        SaverTensors.of(saver_def, graph)


def test_computed_names_are_refused(graph: Any) -> None:
    saver_def = tf1.train.SaverDef(save_tensor_name="name:0", restore_op_name="write")
    prefix = tf.constant("prefix", name="name_of")
    write = tf.raw_ops.SaveV2(
        prefix=prefix, tensor_names=tf1.placeholder(tf.string, [1], name="names"), shape_and_slices=[""], tensors=[1.0]
    )
    with tf.control_dependencies([write]):
        tf.identity(prefix, name="name")
    with pytest.raises(UsageError, match=r"computes its tensor names.*names:0"):
        SaverTensors.of(saver_def, graph)


def save_ops(*entries: tuple[str, str, Any]) -> SaverTensors:
    """What a save op made by hand saves."""
    names, specs, tensors = zip(*entries, strict=True)
    op = tf.raw_ops.SaveV2(
        prefix="p", tensor_names=list(names), shape_and_slices=list(specs), tensors=list(map(tf.constant, tensors))
    )
    with tf.control_dependencies([op]):
        last = tf.constant("done")
    return SaverTensors.of(tf1.train.SaverDef(save_tensor_name=last.name), last.graph)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "", 1.0), ("a", "", 2.0)], "two tensors as 'a'"),
        ([("a", "4 0,2", [1.0, 2.0]), ("a", "", 2.0)], "two tensors as 'a'"),
        ([("a", "", 1.0), ("a", "4 0,2", [1.0, 2.0])], "two tensors as 'a'"),
        ([("a", "4 0,2", [1.0, 2.0]), ("a", "5 2,2", [1.0, 2.0])], r"different shapes, \[\(4,\), \(5,\)\]"),
        ([("a", "4 0,3", [1.0, 2.0])], r"a: 'Const.*' has the shape \(2,\), but.*\(3,\) at \(0,\) of \(4,\)"),
    ],
)
def test_what_cannot_be_one_checkpoint_is_refused(
    graph: Any, entries: list[tuple[str, str, Any]], message: str
) -> None:
    saved = save_ops(*entries)
    with tf1.Session() as session, pytest.raises(StateError, match=message):
        saved.state(session.run(saved.fetches))


def test_slice_specs() -> None:
    assert parse_slice_spec("10 3 4,3:0,3") == ((10, 3), Box((4, 0), (3, 3)))
    assert parse_slice_spec("10 3 4,3:-") == ((10, 3), Box((4, 0), (3, 3)))
    for bad in ("", "10 3", "10 3 4,3", "x 0,1", "10 1,2,3", "10 0"):
        with pytest.raises(UsageError, match="is not a slice spec"):
            parse_slice_spec(bad)
