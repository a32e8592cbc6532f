"""tf.Variable and eager tf.Tensor, strings too."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_ckpt.bundle import dtype_name
from ray_ckpt.errors import StateError
from ray_ckpt.leaves import numpy_leaf
from ray_ckpt.leaves.base import Array, Form, Parts, Wanted, sole, unsupported, whole
from ray_ckpt.types import Box


def matches(value: Any) -> bool:
    """True for tensors and variables, if this process uses TensorFlow at all."""
    tf = sys.modules.get("tensorflow")
    # Both are missing while another thread is still importing TensorFlow.
    types = tuple(filter(None, (getattr(tf, "Tensor", None), getattr(tf, "Variable", None))))
    return isinstance(value, types)


def describe(name: str, value: Any) -> Form:
    """The tensor's form.

    Raises:
        StateError: a tensor of a graph, of unknown shape, or of a type that has no array form.
    """
    if not hasattr(value, "numpy"):
        raise unsupported(name, value, "a graph tensor has no value outside its session; use eager execution")
    try:
        shape = tuple(value.shape.as_list())
        stored = dtype_name(np.dtype(value.dtype.base_dtype.as_numpy_dtype))
    except KeyError:
        # TensorFlow's answer for handles and variants, which numpy has no dtype for.
        raise unsupported(name, value, f"dtype {value.dtype.name}") from None
    except (StateError, TypeError, ValueError) as err:
        raise unsupported(name, value, str(err)) from None
    return Form(stored, shape, whole(shape), "tf:variable" if _is_variable(value) else "tf")


def token(value: Any) -> None:
    """None: describing is quick enough."""


def start_transfer(value: Any, box: Box) -> None:
    """TensorFlow offers no transfer ahead."""


def parts(value: Any, box: Box) -> Parts:
    """A view of the tensor's memory where it lies on the host and numpy knows its dtype."""
    tensor = value.read_value() if _is_variable(value) else value
    if value.dtype.name.startswith("string"):
        return [(box, _string_array(tensor.numpy(), box))]
    try:
        array = np.asarray(memoryview(tensor))
    except (TypeError, ValueError, BufferError):
        array = np.asarray(tensor.numpy())
    return numpy_leaf.from_whole(array, box)


def wanted(name: str, like: Any) -> Wanted:
    """The whole tensor."""
    form = describe(name, like)
    return Wanted(form.dtype, form.shape, form.boxes)


def build(_kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """The variable of ``like``, assigned in place; else a new tensor."""
    array = sole(pieces)
    tf = sys.modules.get("tensorflow")
    if tf is None:
        return array
    if like is None:
        return tf.constant(array)
    tensor = tf.constant(array, dtype=like.dtype)
    if _is_variable(like):
        like.assign(tensor)
        return like
    return tensor


def _is_variable(value: Any) -> bool:
    return hasattr(value, "assign")


def _string_array(value: Any, box: Box) -> Array:
    """A string tensor's numpy value, which is bare bytes for a scalar, as an object array."""
    if isinstance(value, bytes):
        array = np.empty((), object)
        array[()] = value
        return array
    return np.asarray(value, object)[box.slices]
