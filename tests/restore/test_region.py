"""The arithmetic between rectangles and ranges, against numpy."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.restore.region import rectangles, scatter, span, spans
from ray_ckpt.types import Box

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape and a non-empty box in it."""
    shape = draw(shapes)
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return shape, Box(offset, extent)


def numbers_in(shape: tuple[int, ...], box: Box) -> list[int]:
    """The places in C order of a box's elements."""
    places = np.arange(math.prod(shape)).reshape(shape)
    return [int(i) for i in np.atleast_1d(places[box.slices]).ravel()]


@given(regions())
def test_span_holds_the_region_tightly(case: tuple[tuple[int, ...], Box]) -> None:
    numbers = numbers_in(*case)
    assert span(case[1], case[0]) == (numbers[0], numbers[-1] + 1)


@given(regions(), st.integers(1, 30))
def test_spans_hold_the_region_and_are_few(case: tuple[tuple[int, ...], Box], min_stride: int) -> None:
    shape, region = case
    found = list(spans(region, shape, min_stride))
    covered = [i for start, stop in found for i in range(start, stop)]
    assert covered == sorted(set(covered))
    assert set(numbers_in(shape, region)) <= set(covered)
    assert len(found) <= max(1, math.prod(shape) // min_stride)


@given(shapes, st.data())
def test_rectangles_are_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    found = list(rectangles(start, stop, shape))
    assert [i for _, box in found for i in numbers_in(shape, box)] == list(range(start, stop))
    assert [at for at, _ in found] == [numbers_in(shape, box)[0] for _, box in found]
    assert len(found) <= max(1, 2 * len(shape))


@given(regions(), st.data())
def test_scatter_copies_what_is_common(case: tuple[tuple[int, ...], Box], data: st.DataObject) -> None:
    shape, region = case
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    array = np.arange(total)
    out = np.full(region.shape, -1)
    scatter(array[start:stop], start, shape, region, out)
    wanted = array.reshape(shape)[region.slices]
    assert np.array_equal(out, np.where((wanted >= start) & (wanted < stop), wanted, -1))
