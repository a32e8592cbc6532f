"""Does a set of boxes cover an array exactly once? In time proportional to their number."""

from __future__ import annotations

from collections.abc import Sequence

from ray_ckpt.types import Box, Shape

_CORNER_LIMIT = 1 << 21


def out_of_bounds(shape: Shape, boxes: Sequence[Box]) -> Box | None:
    """The first box that is not inside an array of this shape, or has another rank."""
    rank = len(shape)
    for box in boxes:
        if len(box.offset) != rank or len(box.shape) != rank:
            return box
        if any(o < 0 or n < 0 or o + n > d for o, n, d in zip(box.offset, box.shape, shape, strict=True)):
            return box
    return None


def first_fault(shape: Shape, boxes: Sequence[Box]) -> tuple[Shape, int] | None:
    """The first element, in C order, that is not in exactly one box, and in how many it is.

    The boxes must be in bounds. None means that they are a partition.

    The number of boxes over each element, less one, is zero everywhere exactly when its mixed difference
    along all dimensions is. That difference is non-zero only at corners of boxes: +1 or -1 at each of the
    2^k of a box, k the number of dimensions that are cut. At the first corner in C order that does not cancel
    it equals the number itself, as every other corner that counts there would come before it.
    """
    cut = [d for d, n in enumerate(shape) if any(box.shape[d] != n for box in boxes)]
    difference: dict[int, int] = {}
    for weight, box in ((-1, Box.whole(shape)), *((1, box) for box in boxes)):
        corners = [(0, weight)]
        for d in cut:
            low, high, extent = box.offset[d], box.offset[d] + box.shape[d], shape[d] + 1
            corners = [
                corner for at, sign in corners for corner in ((at * extent + low, sign), (at * extent + high, -sign))
            ]
        for at, sign in corners:
            total = difference.pop(at, 0) + sign
            if total:
                difference[at] = total
    if not difference:
        return None
    first = min(difference)
    return _element(first, shape, cut), 1 + difference[first]


def countable(shape: Shape, boxes: Sequence[Box]) -> bool:
    """False where `first_fault` would take memory out of proportion (hostile files only)."""
    cut = sum(any(box.shape[d] != n for box in boxes) for d, n in enumerate(shape))
    return len(boxes) << cut <= _CORNER_LIMIT


def holders(element: Shape, boxes: Sequence[Box]) -> list[Box]:
    """The boxes that hold an element."""
    return [box for box in boxes if all(o <= i < o + n for i, o, n in zip(element, box.offset, box.shape, strict=True))]


def _element(at: int, shape: Shape, cut: Sequence[int]) -> Shape:
    element = [0] * len(shape)
    for d in reversed(cut):
        at, element[d] = divmod(at, shape[d] + 1)
    return tuple(element)
