"""What TensorFlow can read back, checked before anything is written.

Each limit was found by experiment on TensorFlow 2.21: a duplicate slice and a slice of rank 9 abort the
reading process, the others fail there with a message that names neither the tensor nor the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_ckpt.bundle.cover import first_fault, holders, out_of_bounds
from ray_ckpt.bundle.dtypes import DTYPE_NAMES, UNPARTITIONABLE, VARIANT
from ray_ckpt.errors import StateError
from ray_ckpt.types import Box, Shape

MAX_SLICES = 4096
"""Slices a tensor: reading one with more takes TensorFlow tens to hundreds of times as long."""

MAX_PARTITIONED_RANK = 8
MAX_RANK = 254
MAX_ELEMENTS = (1 << 63) - 1


def check_tensor(name: str, dtype: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Check that TensorFlow will be able to read a tensor that is stored in these boxes.

    ``boxes`` holds the one whole box of an unpartitioned tensor, else a partition of ``shape``.

    Raises:
        StateError: the name, type, shape or slices are beyond TensorFlow's limits.
    """
    check_name(name)
    if dtype not in DTYPE_NAMES and dtype != VARIANT:
        raise StateError(
            f"{name}: TensorFlow checkpoints hold no dtype {dtype!r}; cast to one of {', '.join(sorted(DTYPE_NAMES))}"
        )
    _check_shape(name, shape)
    if list(boxes) != [Box.whole(shape)]:
        _check_partitioned(name, dtype, shape, len(boxes))
        _check_slices(name, shape, boxes)


def check_name(name: str) -> None:
    """Check a tensor's name.

    Raises:
        StateError: the name is empty (the header's key), begins with NUL (the mark of a slice's key) or has
            no UTF-8 form.
    """
    if not name:
        raise StateError("a tensor's name is empty: TensorFlow keeps the empty key for itself; name the leaf")
    if name.startswith("\0"):
        raise StateError(f"{name!r}: TensorFlow keeps names that begin with NUL for slices; rename the leaf")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise StateError(f"{name!r}: the name has no UTF-8 form ({error.reason}); rename the leaf") from None


def _check_slices(name: str, shape: Shape, boxes: Sequence[Box]) -> None:
    if not boxes:
        raise StateError(f"{name}: no rank holds any of its slices; shape {shape}")
    outside = out_of_bounds(shape, boxes)
    if outside is not None:
        raise StateError(f"{name}: slice {describe(outside)} is not inside the tensor's shape {shape}")
    seen: set[Box] = set()
    for box in boxes:
        if box.size == 0:
            raise StateError(f"{name}: slice {describe(box)} is empty; leave it out")
        if box in seen:
            raise StateError(f"{name}: slice {describe(box)} comes twice; each part must have one writer")
        seen.add(box)
    fault = first_fault(shape, boxes)
    if fault is None:
        return
    element, count = fault
    if count == 0:
        raise StateError(f"{name}: no slice holds element {element} of shape {shape}; a rank's part is missing")
    first, second = holders(element, boxes)[:2]
    raise StateError(f"{name}: slices {describe(first)} and {describe(second)} overlap at element {element}")


def describe(box: Box) -> str:
    """A box as the index that cuts it out: "[0:4, 2:8]"."""
    return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(box.offset, box.shape, strict=False)) + "]"


def _check_shape(name: str, shape: Shape) -> None:
    if len(shape) > MAX_RANK:
        raise StateError(f"{name}: rank {len(shape)}; TensorFlow has at most {MAX_RANK} dimensions")
    if any(n < 0 for n in shape):
        raise StateError(f"{name}: shape {shape} has a negative dimension")
    if math.prod(n for n in shape if n) > MAX_ELEMENTS:
        raise StateError(f"{name}: shape {shape} has more elements than TensorFlow's 64-bit sizes can count")


def _check_partitioned(name: str, dtype: str, shape: Shape, count: int) -> None:
    if not shape:
        raise StateError(f"{name}: a scalar cannot be stored in slices; give it to one rank")
    if 0 in shape:
        raise StateError(f"{name}: shape {shape} has no elements to cut into slices; store it whole, from one rank")
    if len(shape) > MAX_PARTITIONED_RANK:
        raise StateError(
            f"{name}: rank {len(shape)} in slices, TensorFlow aborts above {MAX_PARTITIONED_RANK}; reshape "
            "it to fewer dimensions, or let one rank hold all of it"
        )
    if dtype in UNPARTITIONABLE:
        raise StateError(
            f"{name}: TensorFlow cannot read {dtype} back from slices; let one rank hold all of it, or "
            "save it as a type that it can (bfloat16, float32, int8, int16, int32, int64)"
        )
    if count > MAX_SLICES:
        raise StateError(
            f"{name}: {count} slices; TensorFlow is slow beyond reason above {MAX_SLICES}; let each rank "
            "hold fewer, larger rectangles"
        )
