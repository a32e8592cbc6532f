"""Python's own values: int (int64), float (float64), complex (complex128), bool, str and bytes (string)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_ckpt.errors import StateError
from ray_ckpt.leaves.base import Array, Form, Parts, Wanted, sole, whole
from ray_ckpt.types import Box

_DTYPES = {
    bool: "bool",
    int: "int64",
    float: "float64",
    complex: "complex128",
    str: "string",
    bytes: "string",
}
_KINDS: dict[str, type] = {kind.__name__: kind for kind in _DTYPES}
_INT64 = range(-(2**63), 2**63)


def matches(value: Any) -> bool:
    """True for the exact types and their subclasses; numpy's scalars go first, to their own kind."""
    return isinstance(value, (int, float, complex, str, bytes))


def describe(name: str, value: Any) -> Form:
    """The scalar's form.

    Raises:
        StateError: an int that int64 cannot hold, or a str that UTF-8 cannot.
    """
    kind = _python_type(value)
    if kind is int and value not in _INT64:
        raise StateError(f"{name}: the int {value} does not fit int64; save it as str or bytes")
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise StateError(f"{name}: the str is not valid UTF-8; save it as bytes") from None
    return Form(_DTYPES[kind], (), whole(()), kind.__name__)


def token(value: Any) -> None:
    """None: describing is quick enough."""


def start_transfer(value: Any, box: Box) -> None:
    """Nothing to bring."""


def parts(value: Any, box: Box) -> Parts:
    """One 0-d array."""
    kind = _python_type(value)
    if kind is str or kind is bytes:
        array = np.empty((), object)
        array[()] = str.encode(value) if kind is str else bytes(value)
        return [(box, array)]
    return [(box, np.array(value, _DTYPES[kind]))]


def wanted(name: str, like: Any) -> Wanted:
    """The scalar."""
    form = describe(name, like)
    return Wanted(form.dtype, form.shape, form.boxes)


def build(kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """The scalar as the type of ``like``, or as the stored kind says."""
    python = _KINDS[kind] if like is None else _python_type(like)
    value: Any = sole(pieces)[()]
    if python is str:
        return value.decode()
    return python(value)


def _python_type(value: Any) -> type:
    kind = type(value)
    return kind if kind in _DTYPES else next(known for known in _DTYPES if isinstance(value, known))
