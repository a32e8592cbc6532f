"""TensorFlow's tensors and variables as leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import StateError
from ray_ckpt.leaves import build, describe, read_box, wanted
from ray_ckpt.types import Box

tf = pytest.importorskip("tensorflow")


def read(value: Any) -> np.ndarray:
    spec = describe("x", value, 0, 1)
    return read_box(value, spec, spec.boxes[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool", "complex64", "float16", "uint8"])
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_tensors_and_variables(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = tf.cast(tf.reshape(tf.range(int(np.prod(shape))), shape), dtype)
    for value, kind in ((tensor, "tf"), (tf.Variable(tensor), "tf:variable")):
        spec = describe("x", value, 0, 1)
        assert (spec.dtype, spec.shape, spec.boxes, spec.kind) == (dtype, shape, (Box.whole(shape),), kind)
        assert wanted("x", value) == (dtype, shape, (Box.whole(shape),))
        np.testing.assert_array_equal(read(value), tensor.numpy())
        got = build(kind, value, {Box.whole(shape): tensor.numpy()})
        assert got.dtype.name == dtype
        np.testing.assert_array_equal(got.numpy(), tensor.numpy())


def test_a_variable_is_assigned_in_place() -> None:
    variable = tf.Variable([1.0, 2.0])
    got = build("tf:variable", variable, {Box((0,), (2,)): np.array([3, 4], np.float32)})
    assert got is variable
    assert variable.numpy().tolist() == [3, 4]


def test_what_was_read_does_not_change_with_the_variable() -> None:
    variable = tf.Variable([1.0, 2.0])
    array = read(variable)
    variable.assign_add([10.0, 10.0])
    assert array.tolist() == [1, 2]


@pytest.mark.parametrize("text", ["a", ["a", "grüße", ""], []])
def test_strings(text: Any) -> None:
    for value in (tf.constant(text, tf.string), tf.Variable(tf.constant(text, tf.string))):
        spec = describe("x", value, 0, 1)
        assert spec.dtype == "string"
        array = read(value)
        assert array.dtype == object
        got = build(spec.kind, value, {spec.boxes[0]: array})
        assert np.array_equal(got.numpy(), tf.constant(text, tf.string).numpy())


def test_a_part_of_a_tensor() -> None:
    value = tf.reshape(tf.range(12), (3, 4))
    spec = describe("x", value, 0, 1)
    np.testing.assert_array_equal(read_box(value, spec, Box((1, 2), (2, 2))), [[6, 7], [10, 11]])


def test_without_a_target_a_tensor_comes_back() -> None:
    got = build("tf", None, {Box((0,), (2,)): np.array([1, 2])})
    assert isinstance(got, tf.Tensor)


def test_graph_tensors_are_errors() -> None:
    with tf.Graph().as_default():
        with pytest.raises(StateError, match=r"w: cannot save .*graph tensor"):
            describe("w", tf.constant(1), 0, 1)
        with pytest.raises(StateError, match=r"w: cannot save"):
            describe("w", tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[1]), 0, 1)
    with pytest.raises(StateError, match=r"w: cannot save"):
        describe("w", tf.Variable(1.0).handle, 0, 1)
