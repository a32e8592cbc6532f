"""Dense torch tensors, on any device. A dtype that numpy lacks travels as integers of its size."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_ckpt.bundle import DTYPE_NAMES, dtype_of
from ray_ckpt.errors import StateError
from ray_ckpt.leaves.base import Array, Form, Parts, Wanted, sole, unsupported, whole
from ray_ckpt.types import Box

_CARRIERS = {1: "uint8", 2: "int16"}
"""Integers of the size of dtypes that numpy lacks, by item size in bytes."""


def matches(value: Any) -> bool:
    """True for tensors, if this process uses torch at all."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def describe(name: str, value: Any) -> Form:
    """The tensor's form.

    Raises:
        StateError: a sparse, quantized or meta tensor, or a dtype that no checkpoint holds.
    """
    if value.device.type == "meta":
        raise StateError(f"{name}: a tensor on the meta device has no value to save; pass the real one")
    return _form(name, value)


def _form(name: str, value: Any) -> Form:
    torch = sys.modules["torch"]
    if value.layout != torch.strided or value.is_quantized:
        raise unsupported(name, value, "not a dense tensor; save its parts")
    stored = _dtype_name(value)
    if stored not in DTYPE_NAMES:
        raise StateError(f"{name}: torch dtype {stored} cannot be stored; cast the tensor")
    shape = tuple(value.shape)
    return Form(stored, shape, whole(shape), "torch")


def token(value: Any) -> None:
    """None: describing is quick enough."""


def start_transfer(value: Any, box: Box) -> None:
    """A copy from a device needs pinned host memory to run ahead; it is made in `parts`."""


def parts(value: Any, box: Box) -> Parts:
    """A view of the tensor's memory on the host, or of a copy of its part there."""
    part = value.detach()[box.slices] if box.shape else value.detach()
    return [(box, _to_numpy(part.resolve_conj().resolve_neg().cpu()))]


def wanted(name: str, like: Any) -> Wanted:
    """The whole tensor; on the meta device it is an abstract target."""
    form = _form(name, like)
    return Wanted(form.dtype, form.shape, form.boxes)


def build(_kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """A new tensor with the device and gradient flag of ``like``; on the host for the meta device."""
    array = sole(pieces)
    torch = sys.modules.get("torch")
    if torch is None:
        return array
    # torch warns of arrays that it may not write.
    array = np.require(array, requirements=["C", "W"])
    name = array.dtype.name
    if array.dtype.isbuiltin == 1:
        tensor = torch.from_numpy(array)
    else:
        carrier = torch.from_numpy(array.view(_CARRIERS[array.dtype.itemsize]))
        tensor = carrier.view(getattr(torch, name))
    if like is None:
        return tensor
    device = "cpu" if like.device.type == "meta" else like.device
    return tensor.to(device=device).requires_grad_(like.requires_grad)


def _dtype_name(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _to_numpy(tensor: Any) -> Array:
    dtype = dtype_of(_dtype_name(tensor))
    if dtype.isbuiltin == 1:
        array: Array = tensor.numpy()
        return array
    torch = sys.modules["torch"]
    carrier: Array = tensor.view(getattr(torch, _CARRIERS[dtype.itemsize])).numpy()
    return carrier.view(dtype)
