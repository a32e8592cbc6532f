"""TensorFlow's variant tensors as `Variants`: the serialized elements, in a host array of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_ckpt.bundle import VARIANT
from ray_ckpt.leaves.base import Array, Form, Parts, Variants, Wanted, cut, sole, whole
from ray_ckpt.types import Box


def matches(value: Any) -> bool:
    """True for `Variants`."""
    return isinstance(value, Variants)


def describe(_name: str, value: Any) -> Form:
    """The tensor's form."""
    return Form(VARIANT, value.shape, whole(value.shape), VARIANT)


def token(value: Any) -> Any:
    """The shape."""
    return VARIANT, value.shape


def start_transfer(value: Any, box: Box) -> None:
    """Nothing to bring."""


def parts(value: Any, box: Box) -> Parts:
    """An object array of bytes."""
    array = np.empty(value.shape, object)
    array.reshape(-1)[:] = value.values
    return [(box, cut(array, Box.whole(value.shape), box))]


def wanted(_name: str, like: Any) -> Wanted:
    """The whole tensor."""
    return Wanted(VARIANT, like.shape, whole(like.shape))


def build(_kind: str, _like: Any, pieces: Mapping[Box, Array]) -> Any:
    """New `Variants`."""
    array = sole(pieces)
    return Variants(tuple(array.flat), array.shape)
