"""Which stored pieces hold a wanted box."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import DamagedError
from ray_ckpt.plan import PieceIndex, intersections
from ray_ckpt.types import Box


def random_partition(rng: random.Random, box: Box, cuts: int) -> list[Box]:
    boxes = [box]
    for _ in range(cuts):
        victim = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(victim.shape))
        at = rng.randint(0, victim.shape[axis])
        for start, n in ((0, at), (at, victim.shape[axis] - at)):
            if n:
                offset = [*victim.offset]
                offset[axis] += start
                boxes.append(Box(tuple(offset), (*victim.shape[:axis], n, *victim.shape[axis + 1 :])))
    rng.shuffle(boxes)
    return boxes


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(0, 12))
def test_the_parts_fill_exactly_what_is_wanted(seed: int, rank: int, cuts: int) -> None:
    rng = random.Random(seed)
    whole = Box.whole(tuple(rng.randint(1, 8) for _ in range(rank)))
    pieces = random_partition(rng, whole, cuts)
    index = PieceIndex(pieces)
    for _ in range(5):
        start = [rng.randrange(n) for n in whole.shape]
        wanted = Box(tuple(start), tuple(rng.randint(1, n - o) for o, n in zip(start, whole.shape, strict=True)))
        counts = np.zeros(whole.shape, int)
        for number, common in index.intersections(wanted):
            assert pieces[number].intersect(wanted) == common
            counts[common.slices] += 1
        expected = np.zeros(whole.shape, int)
        expected[wanted.slices] = 1
        np.testing.assert_array_equal(counts, expected)


def test_scalars_and_empty_boxes() -> None:
    assert intersections(Box((), ()), [Box((), ())]) == [(0, Box((), ()))]
    assert intersections(Box((0, 1), (0, 2)), [Box((0, 0), (0, 4))]) == []
    assert intersections(Box((2,), (0,)), [Box((0,), (4,))]) == []


@pytest.mark.parametrize("pieces", [[], [Box((0,), (2,))], [Box((0,), (1,)), Box((2,), (2,))]])
def test_a_gap_is_an_error_that_names_the_tensor(pieces: list[Box]) -> None:
    with pytest.raises(DamagedError, match=r"layer/w: the stored pieces hold \d of the 4 elements"):
        PieceIndex(pieces, "layer/w").intersections(Box((0,), (4,)))


def test_a_query_looks_at_few_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 300
    pieces = [Box((2 * i, 3 * j), (2, 3)) for i in range(side) for j in range(side)]
    index = PieceIndex(pieces)
    looked = 0
    intersect = Box.intersect

    def counting(self: Box, other: Box) -> Box | None:
        nonlocal looked
        looked += 1
        return intersect(self, other)

    monkeypatch.setattr(Box, "intersect", counting)
    for at in range(0, 2 * side - 4, 7):
        assert len(index.intersections(Box((at, at), (2, 3)))) <= 4
    assert looked <= 4 * side


def test_a_long_piece_among_short_ones_is_found() -> None:
    pieces = [Box((0, 0), (10, 1)), *(Box((i, 1), (1, 1)) for i in range(10))]
    for start in range(10):
        found = intersections(Box((start, 0), (1, 2)), pieces)
        assert found == [(0, Box((start, 0), (1, 1))), (1 + start, Box((start, 1), (1, 1)))]


def test_equal_boxes_need_no_search_of_other_axes() -> None:
    pieces = [Box((i, 0, 0), (1, 1000, 1000)) for i in range(50)]
    assert intersections(Box((7, 0, 0), (2, 1000, 1000)), pieces) == [(7, pieces[7]), (8, pieces[8])]
