"""What the kinds of leaf share: the user's markers, the interface of a kind, and arithmetic on its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ray_ckpt.bundle import dtype_of
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.types import Box, LeafSpec, Shape

Array = NDArray[Any]
Parts = list[tuple[Box, Array]]
"""Host arrays and the boxes of the global array that they fill; together one wanted box."""

OnResize = Literal["error", "first", "init"] | Callable[..., Any]

ON_RESIZE = ("error", "first", "init")

PER_WORKER_PREFIX = "per_worker:"
SLICE_PREFIX = "slice:"


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """A leaf that is one rectangle of a larger array, which the ranks hold together.

    ``array`` has the rectangle's shape; ``offset`` is its first index in an array of ``global_shape``. Ranks
    that pass the same rectangle are replicas.

    Raises `UsageError` for a negative offset or extent, or for numbers of dimensions that differ.
    """

    array: Any
    global_shape: Shape
    offset: Shape

    def __post_init__(self) -> None:
        extents, offset = tuple(self.global_shape), tuple(self.offset)
        shape = getattr(self.array, "shape", None)
        ranks = {len(extents), len(offset), *([len(shape)] if isinstance(shape, tuple) else [])}
        if len(ranks) > 1 or min((*extents, *offset), default=0) < 0:
            held = f" for an array of shape {shape}" if isinstance(shape, tuple) else ""
            raise UsageError(
                "Slice(array, global_shape, offset) needs one index >= 0 for each dimension, found"
                f" global_shape={extents} and offset={offset}{held}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """A leaf that is several rectangles of one larger array, which this rank holds alone or with other ranks.

    The parts are of one ``global_shape`` and dtype and do not overlap.

    Raises `UsageError` where there is no part.
    """

    parts: tuple[Slice, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or not all(isinstance(part, Slice) for part in self.parts):
            raise UsageError(f"Slices(parts) needs at least one Slice and nothing else, found {self.parts!r:.200}")


@dataclass(frozen=True, slots=True)
class Variants:
    """A leaf that is a TensorFlow variant tensor (a tf.data iterator's state), without TensorFlow.

    ``values``: one serialized VariantTensorDataProto for each element of ``shape``, in C order. The shape may change
    from save to save; as a target it stands for any shape.

    Raises `UsageError` for values that are not bytes or do not fill the shape.
    """

    values: Sequence[bytes]
    shape: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.values) != math.prod(self.shape) or not all(isinstance(value, bytes) for value in self.values):
            kinds = ", ".join(sorted({type(value).__name__ for value in self.values}))
            raise UsageError(
                f"Variants(values, shape) needs one bytes for each element of shape {self.shape}, found"
                f" {len(self.values)} values of type {kinds or 'none'}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class PerWorker:
    """A leaf, or container of leaves, whose value is each worker's own (RNG keys, data iterators).

    ``on_resize`` says what a restore on another number of workers does: "error" raises, "first" gives
    everybody rank 0's value, "init" keeps the target's own value; a callable gets the list of all saved
    values with the new rank and world size, and returns the value.

    Raises `UsageError` for any other ``on_resize``.
    """

    value: Any
    on_resize: OnResize = "error"

    def __post_init__(self) -> None:
        rule: object = self.on_resize
        if not callable(rule) and not (isinstance(rule, str) and rule in ON_RESIZE):
            raise UsageError(
                f"PerWorker(value, on_resize) takes {', '.join(map(repr, ON_RESIZE))} or a function, found {rule!r}"
            )


def per_worker_kind(inner: str, rule: OnResize) -> str:
    """The stored kind of a `PerWorker` leaf, with its rule; without one for "error" and for a function."""
    return f"{PER_WORKER_PREFIX}{rule}:{inner}" if rule in ("first", "init") else PER_WORKER_PREFIX + inner


def split_per_worker(kind: str) -> tuple[OnResize, str]:
    """The stored rule and the kind inside the marker."""
    bare = kind.removeprefix(PER_WORKER_PREFIX)
    for rule in ("first", "init"):
        if bare.startswith(f"{rule}:"):
            return cast(OnResize, rule), bare.removeprefix(f"{rule}:")
    return "error", bare


class Form(NamedTuple):
    """What a leaf is: dtype name of `bundle.dtypes`, global shape, the parts held, and the kind."""

    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]
    kind: str


class Wanted(NamedTuple):
    """What a restore target needs: dtype name, global shape, and the boxes to read."""

    dtype: str
    shape: Shape
    boxes: tuple[Box, ...]


class Kind(Protocol):
    """One framework's leaves. Each module of this package but this one is a `Kind`."""

    def matches(self, value: Any) -> bool:
        """True if the leaf is of this framework; never imports it."""

    def describe(self, name: str, value: Any) -> Form:
        """What the leaf is. Raises StateError naming it where it cannot be saved."""

    def token(self, value: Any) -> Any:
        """Quick to get and to compare: values with equal tokens have equal forms. None: only `describe` tells."""

    def start_transfer(self, value: Any, box: Box) -> None:
        """Begin bringing this part to the host, where the framework can do so ahead."""

    def parts(self, value: Any, box: Box) -> Parts:
        """Host arrays that together fill ``box``, views of the value's memory where possible."""

    def wanted(self, name: str, like: Any) -> Wanted:
        """What has to be read to build a value like this one."""

    def build(self, kind: str, like: Any, pieces: Mapping[Box, Array], /) -> Any:
        """A value from the arrays of the wanted boxes, which it may keep.

        ``like`` is the target's leaf; None: a value of the stored ``kind`` from one array, the whole.
        """


@lru_cache(maxsize=65536)
def whole(shape: Shape) -> tuple[Box, ...]:
    """The one box of an array that is held as a whole; cached, as states repeat few shapes."""
    return (Box.whole(shape),)


def sole(pieces: Mapping[Box, Array]) -> Array:
    """The only array of a leaf that is read as one box."""
    (array,) = pieces.values()
    return array


def cut(array: Array, held: Box, box: Box) -> Array:
    """The view of ``box`` in an array that fills ``held``."""
    return array if box == held else array[box.relative_to(held).slices]


def assemble(parts: Parts, spec: LeafSpec, box: Box) -> Array:
    """One array from the parts of a box: the part itself where it is only one."""
    if len(parts) == 1 and parts[0][0] == box:
        return parts[0][1]
    out = np.empty(box.shape, dtype_of(spec.dtype))
    for part, source in parts:
        out[part.relative_to(box).slices] = source
    return out


def merge_boxes(boxes: Iterable[Box]) -> tuple[Box, ...]:
    """Few rectangles that cover the same elements as these disjoint ones, in order."""
    merged = sorted(set(boxes))
    count = -1
    while count != len(merged):
        count = len(merged)
        for axis in range(len(merged[0].shape) if merged else 0):
            merged = _merge_along(merged, axis)
    return tuple(sorted(merged))


def boxes_by_holders(holders: Mapping[Box, Collection[int]]) -> dict[frozenset[int], list[Box]]:
    """Boxes that exactly the same processes hold: only these may be merged (see `jax_leaf`)."""
    classes: dict[frozenset[int], list[Box]] = {}
    for box, processes in holders.items():
        classes.setdefault(frozenset(processes), []).append(box)
    return classes


def _merge_along(boxes: Sequence[Box], axis: int) -> list[Box]:
    """Join boxes that touch along one axis and agree in all others."""
    rows: dict[tuple[Shape, Shape], list[Box]] = {}
    for box in sorted(boxes):
        others = (
            box.offset[:axis] + box.offset[axis + 1 :],
            box.shape[:axis] + box.shape[axis + 1 :],
        )
        row = rows.setdefault(others, [])
        if row and row[-1].offset[axis] + row[-1].shape[axis] == box.offset[axis]:
            last = row[-1]
            longer = (*last.shape[:axis], last.shape[axis] + box.shape[axis], *last.shape[axis + 1 :])
            row[-1] = Box(last.offset, longer)
        else:
            row.append(box)
    return [box for row in rows.values() for box in row]


def unsupported(name: str, value: Any, why: str = "") -> StateError:
    """The error for a value that has no form in a checkpoint."""
    kind = type(value)
    return StateError(
        f"{name}: cannot save a {kind.__module__}.{kind.__qualname__}{f' ({why})' if why else ''}; expected "
        "an array, tensor, number, bool, str or bytes. Make text (json.dumps) or bytes (pickle.dumps) of it, "
        "inside PerWorker if every worker has its own, or leave it out"
    )
