"""Leaves of a user's state: what each one is, its bytes on the host, and how to build it again.

One module a framework, each a `base.Kind`. None imports its framework: a value of it can only be there if the
process has imported it already.

The kind of a leaf, as stored: "numpy", "numpy:scalar", "numpy:str", "numpy:bytes", "jax", "jax:global" (spans
processes), "jax:key:<implementation>", "tf", "tf:variable", "torch", "variant", or a Python type's name; before it
"per_worker:" or "slice:" for a leaf that was marked so, "per_worker:first:" or "per_worker:init:" with that
``on_resize``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ray_ckpt.errors import StateError
from ray_ckpt.leaves import jax_leaf, numpy_leaf, python_leaf, tf_leaf, torch_leaf, variant_leaf
from ray_ckpt.leaves.base import (
    PER_WORKER_PREFIX,
    SLICE_PREFIX,
    Array,
    Form,
    Kind,
    Parts,
    PerWorker,
    Slice,
    Slices,
    Variants,
    Wanted,
    assemble,
    per_worker_kind,
    sole,
    split_per_worker,
    unsupported,
    whole,
)
from ray_ckpt.types import Box, LeafSpec, Shape

__all__ = [
    "Parts",
    "PerWorker",
    "Slice",
    "Slices",
    "Variants",
    "Wanted",
    "build",
    "describe",
    "parts",
    "per_worker_name",
    "read_box",
    "start_transfers",
    "token",
    "wanted",
]

# numpy's scalars are also Python floats, so numpy goes first.
_KINDS = cast(tuple[Kind, ...], (numpy_leaf, python_leaf, jax_leaf, tf_leaf, torch_leaf, variant_leaf))
_KIND_OF_TYPE: dict[type, Kind] = {}


def describe(name: str, value: Any, rank: int, world_size: int) -> LeafSpec:
    """What this rank's leaf is; for `PerWorker` under a name of its own.

    Raises:
        StateError: the value cannot be saved; names the leaf and the remedy.
    """
    if isinstance(value, PerWorker):
        inner = _describe(name, value.value)
        return LeafSpec(
            per_worker_name(name, rank, world_size),
            inner.dtype,
            inner.shape,
            inner.boxes,
            per_worker_kind(inner.kind, value.on_resize),
        )
    return LeafSpec(name, *_describe(name, value))


def token(value: Any) -> Any:
    """Something quick to compare: values with equal tokens are described alike. None: only `describe` tells."""
    if isinstance(value, PerWorker):
        return None
    if isinstance(value, Slices):
        tokens = tuple(map(token, value.parts))
        return None if None in tokens else tokens
    if isinstance(value, Slice):
        inner = token(value.array)
        return None if inner is None else (inner, tuple(value.global_shape), tuple(value.offset))
    return _kind_of("", value).token(value)


def per_worker_name(name: str, rank: int, world_size: int) -> str:
    """Under which name one rank's `PerWorker` leaf is stored."""
    return f"{name}/.per_worker/{rank:05d}-of-{world_size:05d}"


def start_transfers(reads: Iterable[tuple[Any, Box]]) -> None:
    """Begin bringing these parts to the host, all of them before the first is waited for."""
    for value, box in reads:
        for bare, inside, _ in _bare(value, box):
            _kind_of("", bare).start_transfer(bare, inside)


def parts(value: Any, box: Box) -> Parts:
    """Host arrays that together fill ``box`` of the global array, views of the value where possible."""
    if isinstance(value, PerWorker):
        return parts(value.value, box)
    if not isinstance(value, Slice | Slices):
        return _kind_of("", value).parts(value, box)
    return [
        (Box(tuple(o + d for o, d in zip(part.offset, offset, strict=True)), part.shape), array)
        for bare, inside, offset in _bare(value, box)
        for part, array in _kind_of("", bare).parts(bare, inside)
    ]


def read_box(value: Any, spec: LeafSpec, box: Box) -> Array:
    """One host array of ``box``: a view of the value where it lies on the host in one piece.

    Its byte order and strides are the value's; only the elements are as ``spec`` says.
    """
    return assemble(parts(value, box), spec, box)


def wanted(name: str, like: Any) -> Wanted:
    """What has to be read for a leaf of a restore target (the bare name, also of a `PerWorker`).

    Raises:
        StateError: the target's leaf is nothing that a checkpoint holds.
    """
    if isinstance(like, PerWorker):
        return wanted(name, like.value)
    if isinstance(like, Slices):
        each = [wanted(name, part) for part in like.parts]
        return Wanted(*_agreed(name, each), tuple(dict.fromkeys(box for want in each for box in want.boxes)))
    if isinstance(like, Slice):
        inner = _kind_of(name, like.array).wanted(name, like.array)
        box = _slice_box(name, like, inner.shape)
        return Wanted(inner.dtype, tuple(like.global_shape), (box,))
    return _kind_of(name, like).wanted(name, like)


def build(kind: str, like: Any, pieces: Mapping[Box, Array]) -> Any:
    """The restored leaf from one array for each wanted box; markers of ``like`` come back around it.

    Without ``like``: a value of the stored ``kind`` from the one array that is the whole. A kind whose
    framework this process has not imported gives a numpy array. The arrays may become part of the result.
    """
    if isinstance(like, PerWorker):
        return replace(like, value=build(split_per_worker(kind)[1], like.value, pieces))
    if isinstance(like, Slices):
        return Slices(tuple(build(kind, part, {box: pieces[box]}) for part, box in _placed(like)))
    if isinstance(like, Slice):
        array = sole(pieces)
        return replace(like, array=build(kind, like.array, dict.fromkeys(whole(array.shape), array)))
    if like is not None:
        return _kind_of("", like).build(kind, like, pieces)
    if kind.startswith(PER_WORKER_PREFIX):
        rule, inner = split_per_worker(kind)
        return PerWorker(build(inner, None, pieces), rule)
    bare = kind.removeprefix(SLICE_PREFIX)
    return _KIND_BY_NAME.get(bare.split(":")[0], cast(Kind, python_leaf)).build(bare, None, pieces)


_KIND_BY_NAME = cast(
    Mapping[str, Kind],
    {"numpy": numpy_leaf, "jax": jax_leaf, "tf": tf_leaf, "torch": torch_leaf, "variant": variant_leaf},
)


def _kind_of(name: str, value: Any) -> Kind:
    """The module for a value; remembered by type, as a state repeats few.

    Raises:
        StateError: none takes it.
    """
    found = _KIND_OF_TYPE.get(type(value))
    if found is None:
        found = next((kind for kind in _KINDS if kind.matches(value)), None)
        if found is None:
            raise unsupported(name, value)
        _KIND_OF_TYPE[type(value)] = found
    return found


def _describe(name: str, value: Any) -> Form:
    if isinstance(value, Slices):
        return _describe_slices(name, value)
    if not isinstance(value, Slice):
        if isinstance(value, PerWorker):
            raise StateError(f"{name}: PerWorker inside PerWorker; mark the leaf once")
        return _kind_of(name, value).describe(name, value)
    inner = _describe(name, value.array)
    if inner.boxes != whole(inner.shape) or inner.kind.startswith((SLICE_PREFIX, "jax:global")):
        raise StateError(f"{name}: a Slice of what is itself a part; pass the array that this rank holds")
    box = _slice_box(name, value, inner.shape)
    return Form(inner.dtype, tuple(value.global_shape), (box,), SLICE_PREFIX + inner.kind)


def _describe_slices(name: str, value: Slices) -> Form:
    each = [_describe(name, part) for part in value.parts]
    dtype, shape = _agreed(name, each)
    boxes = sorted(box for form in each for box in form.boxes if box.size)
    for one, other in _near(boxes):
        if one.intersect(other) is not None:
            raise StateError(f"{name}: parts of the Slices overlap, {one} and {other}; pass each element once")
    return Form(dtype, shape, tuple(boxes) or each[0].boxes, each[0].kind)


def _near(boxes: Sequence[Box]) -> Iterator[tuple[Box, Box]]:
    """The pairs of sorted boxes that share indices of the first dimension."""
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if one.offset and other.offset[0] >= one.offset[0] + one.shape[0]:
                break
            yield one, other


def _agreed(name: str, each: Sequence[Form | Wanted]) -> tuple[str, Shape]:
    """The dtype and global shape that all parts have.

    Raises:
        StateError: they differ.
    """
    found = sorted({(part.dtype, part.shape) for part in each})
    if len(found) > 1:
        told = " and ".join(f"{dtype}{list(shape)}" for dtype, shape in found)
        raise StateError(f"{name}: the parts of a Slices are of {told}; they must be of one array")
    return found[0]


def _placed(value: Slices) -> list[tuple[Slice, Box]]:
    """Each part and the box that it fills."""
    return [
        (part, Box(tuple(part.offset), _kind_of("", part.array).wanted("", part.array).shape)) for part in value.parts
    ]


def _slice_box(name: str, value: Slice, shape: Shape) -> Box:
    """The rectangle that a Slice of an array of this shape fills.

    Raises:
        StateError: it does not lie inside the global shape.
    """
    extents, offset = tuple(value.global_shape), tuple(value.offset)
    fits = len(extents) == len(offset) == len(shape) and all(
        o >= 0 and o + n <= extent for o, n, extent in zip(offset, shape, extents, strict=True)
    )
    if not fits:
        raise StateError(
            f"{name}: a Slice of shape {shape} at offset {offset} is not inside the global shape {extents}"
        )
    return Box(offset, shape)


def _bare(value: Any, box: Box) -> list[tuple[Any, Box, Shape]]:
    """The values without markers that hold ``box``: the part of it in their own coordinates, and where these begin."""
    if isinstance(value, PerWorker):
        return _bare(value.value, box)
    if isinstance(value, Slices):
        shared = ((part, held.intersect(box)) for part, held in _placed(value))
        return [found for part, common in shared if common is not None for found in _bare(part, common)]
    if isinstance(value, Slice):
        inside = Box(tuple(o - d for o, d in zip(box.offset, value.offset, strict=True)), box.shape)
        return [(value.array, inside, tuple(value.offset))]
    return [(value, box, ())]
