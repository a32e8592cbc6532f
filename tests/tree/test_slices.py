"""Several rectangles of one array on one rank."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.leaves import PerWorker, Slice, Slices, build, describe, parts, read_box, token, wanted
from ray_ckpt.types import Box

WHOLE = np.arange(48, dtype=np.float32).reshape(6, 8)
TOP, LEFT, RIGHT = Box((0, 0), (2, 8)), Box((2, 0), (4, 3)), Box((2, 3), (4, 5))


def pieces(*boxes: Box, array: Any = WHOLE) -> Slices:
    return Slices(tuple(Slice(array[box.slices], array.shape, box.offset) for box in boxes))


def test_all_parts_are_described_as_one_leaf() -> None:
    spec = describe("w", pieces(RIGHT, TOP), 0, 2)
    assert (spec.name, spec.dtype, spec.shape, spec.kind) == ("w", "float32", (6, 8), "slice:numpy")
    assert spec.boxes == (TOP, RIGHT)


def test_any_box_of_them_is_read() -> None:
    value = pieces(TOP, LEFT, RIGHT)
    spec = describe("w", value, 0, 1)
    for box in (TOP, LEFT, RIGHT, Box((3, 1), (2, 2)), Box((1, 2), (3, 4)), Box.whole((6, 8))):
        assert read_box(value, spec, box).tolist() == WHOLE[box.slices].tolist()
    ((box, view),) = parts(value, Box((3, 4), (2, 2)))
    assert box == Box((3, 4), (2, 2))
    assert np.shares_memory(view, WHOLE)


def test_a_target_wants_its_parts_and_gets_new_ones() -> None:
    like = pieces(LEFT, TOP, array=np.zeros_like(WHOLE))
    want = wanted("w", like)
    assert (want.dtype, want.shape, set(want.boxes)) == ("float32", (6, 8), {TOP, LEFT})
    built = build("slice:numpy", like, {box: WHOLE[box.slices] for box in want.boxes})
    assert [part.offset for part in built.parts] == [LEFT.offset, TOP.offset]
    assert [part.array.tolist() for part in built.parts] == [WHOLE[LEFT.slices].tolist(), WHOLE[TOP.slices].tolist()]


def test_equal_tokens_mean_equal_forms() -> None:
    assert token(pieces(TOP, LEFT)) == token(pieces(TOP, LEFT, array=WHOLE + 1))
    assert token(pieces(TOP, LEFT)) != token(pieces(TOP, RIGHT))
    assert token(pieces(TOP, LEFT)) != token(pieces(TOP, LEFT, array=WHOLE.astype(np.float64)))
    assert token(pieces(TOP, array=np.array([["a"] * 8] * 6))) is None


def test_parts_without_elements_are_left_out() -> None:
    assert describe("w", pieces(Box((0, 0), (0, 8)), TOP, Box((2, 0), (0, 8))), 0, 1).boxes == (TOP,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pieces(TOP, Box((1, 7), (2, 1))), "w: parts of the Slices overlap"),
        (pieces(TOP, TOP), "w: parts of the Slices overlap"),
        (Slices((Slice(np.float32(1), (), ()), Slice(np.float32(1), (), ()))), "w: parts of the Slices overlap"),
        (
            Slices((Slice(np.zeros(2), (4,), (0,)), Slice(np.zeros(2), (5,), (2,)))),
            "w: the parts of a Slices are of float64[4] and float64[5]",
        ),
        (
            Slices((Slice(np.zeros(2), (4,), (0,)), Slice(np.zeros(2, np.int8), (4,), (2,)))),
            "w: the parts of a Slices are of float64[4] and int8[4]",
        ),
        (Slices((Slice(np.zeros(2), (4,), (3,)),)), "w: a Slice of shape (2,) at offset (3,) is not inside"),
        (Slices((Slice(PerWorker(np.zeros(2)), (4,), (0,)),)), "w: PerWorker inside PerWorker"),
    ],
)
def test_parts_that_are_not_of_one_array_are_errors(value: Slices, text: str) -> None:
    with pytest.raises(StateError, match=re.escape(text)):
        describe("w", value, 0, 1)


def test_parts_that_overlap_in_a_later_dimension_are_found_among_many() -> None:
    boxes = [Box((row, column), (1, 1)) for row in range(6) for column in range(8)]
    describe("w", pieces(*boxes), 0, 1)
    with pytest.raises(StateError, match="overlap"):
        describe("w", pieces(*boxes[:40], Box((2, 4), (4, 1))), 0, 1)


@pytest.mark.parametrize("parts", [(), (np.zeros(2),), (Slices((Slice(1.0, (), ()),)),)])
def test_it_is_made_of_slices(parts: Any) -> None:
    with pytest.raises(UsageError, match="needs at least one Slice and nothing else"):
        Slices(parts)
