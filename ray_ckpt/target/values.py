"""From a matched target to its values: one concurrent, bounded read of all boxes, then each leaf built from its own.

What changes the target itself (variables are assigned in place) comes last, when everything else has succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from ray_ckpt.bundle import dtype_of
from ray_ckpt.errors import MismatchError, UsageError
from ray_ckpt.leaves import build
from ray_ckpt.restore import Progress, StoredCheckpoint, Wanted, check_extents, collector_paused, lent, read_boxes
from ray_ckpt.target.match import LeafPlan, Source, bare
from ray_ckpt.types import Box

Array = np.ndarray[Any, Any]
Pieces = dict[Box, Array]

_JAX_ALIGNMENT = 64
"""Bytes; found by experiment with JAX 0.10."""

_LARGE_NBYTES = 1 << 20
"""From here on a copy costs more than to align."""


def read_values(
    stored: StoredCheckpoint,
    plans: Iterable[LeafPlan],
    *,
    threads: int,
    budget_nbytes: int,
    progress: Progress | None,
) -> Callable[[], dict[str, Any]]:
    """Read and verify all leaves; what this returns builds their values by name, once.

    Raises:
        MismatchError: when built: a value is not one of the target's type.
        UsageError: there is no memory for a leaf.
        DamagedError, ObjectMissingError, StorageError: as `restore.read_boxes`.
    """
    # Variables last: until all else is done, an error leaves them as they were.
    plans = sorted(plans, key=_is_in_place)
    # The size of what has a target is the target's; that of the rest is only what the index claims.
    check_extents(stored, {s.tensor.name for plan in plans for s in plan.sources if s.like is None})
    pieces, wanted = _allocated(stored, plans)
    read_boxes(stored, wanted, threads=threads, budget_nbytes=budget_nbytes, progress=progress)
    return partial(_built, plans, pieces)


@collector_paused()
def _built(plans: list[LeafPlan], pieces: list[list[Pieces]]) -> dict[str, Any]:
    """The values by name; empties both lists."""
    # Last first, so that each leaf's arrays are free as soon as it has been built.
    plans.reverse()
    pieces.reverse()
    values: dict[str, Any] = {}
    while plans:
        plan = plans.pop()
        values[plan.name] = _build_leaf(plan, pieces.pop())
    return values


@collector_paused()
def _allocated(stored: StoredCheckpoint, plans: list[LeafPlan]) -> tuple[list[list[Pieces]], list[Wanted]]:
    """Arrays for each source of each leaf, and the same as what is to be read; new ones, but where memory is lent."""
    pieces: list[list[Pieces]] = []
    wanted: list[Wanted] = []
    for plan in plans:
        arrays = [_allocate(stored, plan.name, source) for source in plan.sources]
        pieces.append(arrays)
        for source, boxes in zip(plan.sources, arrays, strict=True):
            wanted += [(source.tensor.name, box, array) for box, array in boxes.items()]
    return pieces, wanted


def _is_in_place(plan: LeafPlan) -> bool:
    return hasattr(bare(plan.like), "assign")


def _allocate(stored: StoredCheckpoint, name: str, source: Source) -> Pieces:
    dtype = dtype_of(source.tensor.dtype)
    arrays: Pieces = {}
    try:
        for box in source.boxes:
            own = lent(stored, source.tensor.name, box)
            arrays[box] = _aligned(np.empty(box.shape, dtype), source) if own is None else own
        return arrays
    except (MemoryError, ValueError) as error:
        raise UsageError(
            f"{name}: no memory for its part of {dtype.name}{list(source.tensor.shape)} ({error}): restore it on"
            " more workers, or in slices (ray_ckpt.Slice)"
        ) from None


def _aligned(array: Array, source: Source) -> Array:
    """An array, not filled yet, or one like it that JAX takes for its own on the CPU, where it copies others."""
    if array.nbytes < _LARGE_NBYTES or array.dtype.hasobject:
        return array
    if not (source.kind.startswith("jax") or hasattr(bare(source.like), "sharding")):
        return array
    room = np.empty(array.nbytes + _JAX_ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _JAX_ALIGNMENT
    aligned: Array = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    return aligned


def _build_leaf(plan: LeafPlan, pieces: list[Pieces]) -> Any:
    try:
        values = [_build(source, arrays) for source, arrays in zip(plan.sources, pieces, strict=True)]
    except UnicodeDecodeError as error:
        raise MismatchError(
            f"{plan.name}: expected text, found bytes that are not UTF-8 ({error}); make the target's leaf bytes"
        ) from None
    except MismatchError as error:
        raise MismatchError(f"{plan.name}: {error}") from None
    return values[0] if plan.combine is None else plan.combine(values)


def _build(source: Source, pieces: Pieces) -> Any:
    dtype = source.dtype
    if dtype is not None:
        pieces = {box: converted(array, dtype) for box, array in pieces.items()}
    return build(source.kind, source.like, pieces)


def converted(array: Array, dtype: np.dtype[Any]) -> Array:
    """The elements as another type of number: rounded to a floating-point one, the same in any other.

    Raises:
        MismatchError: an element has no such value in an integer or bool, or an imaginary part would be lost.
    """
    is_complex = array.dtype.kind == "c" and dtype.kind != "c"
    with np.errstate(all="ignore"):
        out: Array = (array.real if is_complex else array).astype(dtype)
        if is_complex:
            lost = array.imag != 0
        elif "float" in dtype.name or dtype.kind == "c":
            return out
        else:
            # The way back alone would not show a change of sign: it turns -1 to 255 and 255 to -1.
            lost = (out.astype(array.dtype) != array) | ((out < 0) != (array < 0))
    if lost.any():
        raise MismatchError(
            f"{array[lost].flat[0]} has no value in {dtype.name}; expected {dtype.name}, found {array.dtype.name}:"
            " make the target's leaf of the stored dtype"
        )
    return out
