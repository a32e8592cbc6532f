"""Rectangles in an array against ranges of its elements in C order. Pure arithmetic, in elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ray_ckpt.types import Box, Shape

Array = np.ndarray[Any, Any]


def cut(array: Array, box: Box) -> Array:
    """The part of an array in a box, always as a view."""
    view: Array = array[box.slices] if box.shape else array
    return view


def span(region: Box, shape: Shape) -> tuple[int, int]:
    """The first element of a non-empty region and the one after its last."""
    first = last = 0
    for offset, extent, dim in zip(region.offset, region.shape, shape, strict=True):
        first = first * dim + offset
        last = last * dim + offset + extent - 1
    return first, last + 1


def spans(region: Box, shape: Shape, min_stride: int) -> Iterator[tuple[int, int]]:
    """Ranges, ascending, that hold a non-empty region.

    Gaps are left out only between rows that are at least ``min_stride`` elements apart, so that there are
    never more ranges than the array has stretches of that length.
    """
    outer = 0
    while outer < len(shape) and math.prod(shape[outer + 1 :]) >= min_stride:
        outer += 1
    inner_shape = shape[outer:]
    first, stop = span(Box(region.offset[outer:], region.shape[outer:]), inner_shape)
    rows = [range(o, o + n) for o, n in zip(region.offset[:outer], region.shape[:outer], strict=True)]
    stride = math.prod(inner_shape)
    for row in itertools.product(*rows):
        start = 0
        for i, dim in zip(row, shape, strict=False):
            start = start * dim + i
        yield start * stride + first, start * stride + stop


def rectangles(start: int, stop: int, shape: Shape) -> Iterator[tuple[int, Box]]:
    """The elements start <= i < stop as rectangles, each with its first element; at most 2 a dimension.

    Each rectangle is itself one unbroken range of elements.
    """
    if start >= stop:
        return
    rank = len(shape)
    # The dimension where the range first spreads over more than one row: above it, one index is fixed.
    fixed: list[int] = []
    stride = math.prod(shape)
    for d in range(rank):
        row = stride // shape[d]
        if start // row != (stop - 1) // row:
            break
        fixed.append(start // row % shape[d])
        stride = row
    else:
        yield start, Box(tuple(fixed), (1,) * rank)
        return
    d = len(fixed)
    inner = shape[d + 1 :]
    first, last = -(-start // row), stop // row
    if start < first * row:
        for at, box in rectangles(start % row, row, inner):
            yield start - start % row + at, _inside(fixed, (first - 1) % shape[d], box)
    if first < last:
        offset = (*fixed, first % shape[d], *(0 for _ in inner))
        yield first * row, Box(offset, (*(1 for _ in fixed), last - first, *inner))
    if last * row < stop:
        for at, box in rectangles(0, stop - last * row, inner):
            yield last * row + at, _inside(fixed, last % shape[d], box)


def _inside(fixed: list[int], row: int, box: Box) -> Box:
    return Box((*fixed, row, *box.offset), (*(1 for _ in fixed), 1, *box.shape))


def scatter(flat: Array, start: int, shape: Shape, region: Box, out: Array) -> None:
    """Copy what a stretch of an array holds of a region.

    ``flat`` holds the elements from ``start`` on, in C order, of an array of ``shape``; ``out`` has the shape
    of ``region`` and the dtype of ``flat``.
    """
    for at, rectangle in rectangles(start, start + len(flat), shape):
        common = rectangle.intersect(region)
        if common is not None:
            block = flat[at - start : at - start + rectangle.size].reshape(rectangle.shape)
            cut(out, common.relative_to(region))[...] = cut(block, common.relative_to(rectangle))
