"""TensorFlow's limits: each is refused before anything is written, by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.bundle import DTYPE_NAMES, MAX_SLICES, UNPARTITIONABLE, check_tensor
from ray_ckpt.bundle.cover import first_fault
from ray_ckpt.errors import StateError
from ray_ckpt.types import Box
from tests.bundle.bundles import rows


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_whole_tensors_of_every_type_pass(dtype: str) -> None:
    for shape in [(), (0,), (3, 0), (5, 4), (1,) * 254]:
        check_tensor("w", dtype, shape, [Box.whole(shape)])


@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES - UNPARTITIONABLE))
def test_slices_of_readable_types_pass(dtype: str) -> None:
    check_tensor("w", dtype, (5, 4), rows((5, 4), 3))


@pytest.mark.parametrize("dtype", sorted(UNPARTITIONABLE))
def test_slices_of_unreadable_types(dtype: str) -> None:
    with pytest.raises(StateError, match=rf"layer/w: TensorFlow cannot read {dtype} .* let one rank hold all"):
        check_tensor("layer/w", dtype, (5, 4), rows((5, 4), 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "name is empty"), ("\0w", "begin with NUL"), ("w\ud800", "no UTF-8 form")],
)
def test_names(name: str, message: str) -> None:
    with pytest.raises(StateError, match=message):
        check_tensor(name, "float32", (2,), [Box.whole((2,))])


def test_unusual_names_that_tensorflow_reads() -> None:
    for name in ["a\0b", "ä ü", "/", "..", "%s", "a\nb", "x" * 100_000, "\x01"]:
        check_tensor(name, "float32", (2,), [Box.whole((2,))])


def test_unknown_dtype() -> None:
    with pytest.raises(StateError, match=r"w: .*'float8_e4m3'.*bfloat16"):
        check_tensor("w", "float8_e4m3", (2,), [Box.whole((2,))])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1,) * 255, "rank 255"), ((2, -1), "negative"), ((1 << 40, 1 << 40), "64-bit")],
)
def test_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(StateError, match=message):
        check_tensor("w", "int8", shape, [Box.whole(shape)])


def test_scalar_in_slices() -> None:
    with pytest.raises(StateError, match="scalar"):
        check_tensor("w", "float32", (), [Box((), ()), Box((), ())])


def test_empty_tensor_in_slices() -> None:
    with pytest.raises(StateError, match="no elements"):
        check_tensor("w", "float32", (0, 2), [Box((0, 0), (0, 1)), Box((0, 1), (0, 1))])


def test_rank_9_in_slices() -> None:
    shape = (2,) + (1,) * 8
    with pytest.raises(StateError, match=r"rank 9.*reshape"):
        check_tensor("w", "float32", shape, rows(shape, 2))


def test_too_many_slices() -> None:
    shape = (MAX_SLICES + 1, 2)
    check_tensor("w", "float32", shape, rows(shape, MAX_SLICES))
    with pytest.raises(StateError, match="4097 slices"):
        check_tensor("w", "float32", shape, rows(shape, MAX_SLICES + 1))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "no rank holds"),
        ([Box((0, 0), (2, 4))], r"no slice holds element \(2, 0\)"),
        ([Box((0, 0), (5, 2)), Box((0, 3), (5, 1))], r"no slice holds element \(0, 2\)"),
        (
            [Box((0, 0), (3, 4)), Box((2, 0), (3, 4))],
            r"\[0:3, 0:4\] and \[2:5, 0:4\] overlap at element \(2, 0\)",
        ),
        ([Box((0, 0), (3, 4)), Box((3, 0), (2, 4)), Box((0, 0), (3, 4))], "comes twice"),
        ([Box((0, 0), (5, 4)), Box((0, 0), (5, 4))], "comes twice"),
        ([Box((0, 0), (5, 4)), Box((1, 1), (1, 1))], r"overlap at element \(1, 1\)"),
        ([Box((0, 0), (3, 4)), Box((3, 0), (3, 4))], r"\[3:6, 0:4\] is not inside"),
        ([Box((-1, 0), (6, 4))], "is not inside"),
        ([Box((0,), (5,))], "is not inside"),
        ([Box((0, 0), (5, 4)), Box((2, 0), (0, 4))], "is empty"),
        # as many elements as the tensor has, but not each once
        ([Box((0, 0), (2, 4)), Box((1, 0), (3, 4))], r"overlap at element \(1, 0\)"),
    ],
)
def test_slices_that_do_not_fit(boxes: list[Box], message: str) -> None:
    with pytest.raises(StateError, match=message) as caught:
        check_tensor("layer/w", "float32", (5, 4), boxes)
    assert str(caught.value).startswith("layer/w: ")


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A small shape and a partition of it, with or without one box dropped, repeated or moved."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.shape[d]))
        left = Box(box.offset, tuple(at if i == d else n for i, n in enumerate(box.shape)))
        right = Box(
            tuple(o + at if i == d else o for i, o in enumerate(box.offset)),
            tuple(n - at if i == d else n for i, n in enumerate(box.shape)),
        )
        boxes += [part for part in (left, right) if part.size]
    change = draw(st.sampled_from(["none", "drop", "repeat", "replace"]))
    if change == "drop":
        boxes.pop()
    elif change in ("repeat", "replace"):
        low = tuple(draw(st.integers(0, n - 1)) for n in shape)
        extra = Box(low, tuple(draw(st.integers(1, n - o)) for o, n in zip(low, shape, strict=True)))
        boxes = [*boxes[change == "replace" :], extra]
    return shape, boxes


@given(shapes_and_boxes())
def test_first_fault_is_what_painting_finds(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    painted = np.zeros(shape, int)
    for box in boxes:
        painted[box.slices] += 1
    wrong = np.argwhere(painted != 1)
    expected = (tuple(wrong[0].tolist()), int(painted[tuple(wrong[0])])) if len(wrong) else None
    assert first_fault(shape, boxes) == expected


def test_large_partitions_in_many_dimensions() -> None:
    shape = (4,) * 6
    boxes = [Box(corner, (1,) * 6) for corner in itertools.product(range(4), repeat=6)]
    check_tensor("w", "float32", shape, boxes)
    with pytest.raises(StateError, match=r"no slice holds element \(3, 3, 3, 3, 3, 3\)"):
        check_tensor("w", "float32", shape, boxes[:-1])
