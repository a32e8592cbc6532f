"""TensorFlow's variant tensors as `Variants`: the serialized elements, in a host array of bytes.

An iterator's state has more or fewer elements from save to save. Its form says nothing of them, so that it stays the
same and no new plan is needed: it is written whole, by one rank, with the shape of that moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_ckpt.bundle import VARIANT
from ray_ckpt.leaves.base import Array, Form, Parts, Variants, Wanted, sole, whole
from ray_ckpt.types import Box


def matches(value: Any) -> bool:
    """True for `Variants`."""
    return isinstance(value, Variants)


def describe(_name: str, _value: Any) -> Form:
    """The form of all variant tensors."""
    return Form(VARIANT, (), whole(()), VARIANT)


def token(_value: Any) -> Any:
    """The same for all."""
    return VARIANT


def start_transfer(value: Any, box: Box) -> None:
    """Nothing to bring."""


def parts(value: Any, box: Box) -> Parts:
    """An object array of bytes, of the value's own shape."""
    array = np.empty(value.shape, object)
    array.reshape(-1)[:] = value.values
    return [(box, array)]


def wanted(_name: str, _like: Any) -> Wanted:
    """A tensor of any shape."""
    return Wanted(VARIANT, (), whole(()))


def build(_kind: str, _like: Any, pieces: Mapping[Box, Array]) -> Any:
    """New `Variants`."""
    array = sole(pieces)
    return Variants(tuple(array.flat), array.shape)
