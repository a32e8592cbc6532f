"""numpy arrays and scalars.

Arrays of str and of bytes, whether of a fixed width or of objects, become string tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ray_ckpt.bundle import DTYPE_NAMES, dtype_name, dtype_of, nbytes_of
from ray_ckpt.errors import StateError
from ray_ckpt.leaves.base import Array, Form, Parts, Wanted, cut, sole, unsupported, whole
from ray_ckpt.types import Box

_SCALAR = "numpy:scalar"
_STR = "numpy:str"
_BYTES = "numpy:bytes"
_STORED = {dtype_of(name): name for name in sorted(DTYPE_NAMES) if nbytes_of(name, 1) is not None}
"""Numbers of this machine's byte order: the commonest leaves, for speed only."""


def matches(value: Any) -> bool:
    """True for arrays and scalars, but for scalars of text: they are Python's too."""
    return isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, (str, bytes))


def describe(name: str, value: Any) -> Form:
    """The array's form.

    Raises:
        StateError: a dtype that no checkpoint holds, or objects other than only str or only bytes.
    """
    dtype = value.dtype
    shape = value.shape
    if dtype.kind in "OSU":
        return Form("string", shape, whole(shape), _text_kind(name, np.asarray(value)))
    if isinstance(value, np.ma.MaskedArray):
        raise unsupported(name, value, "save its data and its mask as two arrays")
    try:
        stored = _name_of(dtype)
    except StateError as err:
        raise StateError(f"{name}: {err}") from None
    return Form(stored, shape, whole(shape), _SCALAR if isinstance(value, np.generic) else "numpy")


def token(value: Any) -> Any:
    """Dtype and shape; None for text, where the elements decide, and for subclasses."""
    plain = type(value) is np.ndarray and value.dtype.kind not in "OSU"
    return (value.dtype, value.shape) if plain else None


def start_transfer(value: Any, box: Box) -> None:
    """Nothing to bring."""


def parts(value: Any, box: Box) -> Parts:
    """A view of the array; text as new objects of bytes."""
    array = np.asarray(value)
    if box.shape != array.shape:
        array = array[box.slices]
    return [(box, _as_bytes(array) if array.dtype.kind in "OSU" else array)]


def wanted(name: str, like: Any) -> Wanted:
    """The whole array."""
    if type(like) is np.ndarray and (stored := _STORED.get(like.dtype)):
        return Wanted(stored, like.shape, whole(like.shape))
    form = describe(name, like)
    return Wanted(form.dtype, form.shape, form.boxes)


def build(kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """The array, or the scalar, with the dtype of ``like`` (its byte order and width included)."""
    array = sole(pieces)
    if like is None:
        if kind == _STR:
            return _decoded(array)
        return array[()] if kind == _SCALAR else array
    if like.dtype.kind in "OSU":
        is_str = _text_kind("the target", np.asarray(like)) == _STR
        text = _decoded(array) if is_str else array
        array = text if like.dtype.kind == "O" else _fixed_width(text, like.dtype)
    else:
        array = array.astype(like.dtype, copy=False)
    return array[()] if isinstance(like, np.generic) else array


def from_whole(array: Array, box: Box) -> Parts:
    """The view of ``box`` in a host array that another framework shares."""
    return [(box, cut(array, Box.whole(array.shape), box))]


@lru_cache(maxsize=256)
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype_name(dtype)


def _text_kind(name: str, array: Array) -> str:
    """Whether the elements are str or bytes.

    Raises:
        StateError: any is neither, or both occur.
    """
    if array.dtype.kind != "O":
        return _STR if array.dtype.kind == "U" else _BYTES
    kinds = set(map(type, array.flat))
    if kinds <= {bytes, np.bytes_}:
        return _BYTES
    if kinds <= {str, np.str_}:
        return _STR
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise StateError(
        f"{name}: an object array with elements of type {names}; expected only str or only bytes. "
        "Make text (json.dumps) or bytes (pickle.dumps) of them, inside PerWorker if every worker has its own"
    )


def _as_bytes(array: Array) -> Array:
    """The same elements as objects of bytes."""
    out = np.empty(array.shape, object)
    out.reshape(-1)[:] = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
    return out


def _decoded(array: Array) -> Array:
    out = np.empty(array.shape, object)
    out.reshape(-1)[:] = [item.decode() for item in array.flat]
    return out


def _fixed_width(array: Array, dtype: np.dtype[Any]) -> Array:
    """Fixed-width text as wide as the longest element needs, at least as wide as ``dtype``."""
    unit = 4 if dtype.kind == "U" else 1
    width = max([dtype.itemsize // unit, *(len(item) for item in array.flat)])
    return array.astype(f"{dtype.byteorder.replace('|', '')}{dtype.kind}{max(width, 1)}")
