"""Hand-made slices of any cut, read back in any other on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import DamagedError, MismatchError
from ray_ckpt.leaves import Slice
from ray_ckpt.target import values as target_values
from ray_ckpt.types import Box

from ..restore.make import flip, grid, truncate
from .saving import restore, save

SHAPE = (12, 8)
VALUES = {
    "w": np.arange(96, dtype=np.float32).reshape(SHAPE),
    "m": np.arange(96, dtype=np.int64).reshape(SHAPE)[::-1],
}


def sliced(box: Box, values: Any = VALUES, **more: Any) -> Any:
    """One rank's state: its box of each array, and what all ranks have."""
    return {name: Slice(array[box.slices].copy(), SHAPE, box.offset) for name, array in values.items()} | more


ZEROS = {name: np.zeros_like(array) for name, array in VALUES.items()}
CUTS = [(1, 1), (4, 1), (3, 1), (1, 4), (2, 2)]


@pytest.mark.parametrize("after", CUTS)
@pytest.mark.parametrize("before", CUTS)
def test_from_any_cut_to_any_other(before: tuple[int, int], after: tuple[int, int]) -> None:
    stored = save([sliced(box, step=7) for box in grid(SHAPE, before)])
    boxes = grid(SHAPE, after)
    for rank, box in enumerate(boxes):
        got = restore(stored, sliced(box, ZEROS, step=0), rank, len(boxes))
        assert got["step"] == 7
        for name, whole in VALUES.items():
            assert (got[name].global_shape, got[name].offset) == (SHAPE, box.offset)
            np.testing.assert_array_equal(got[name].array, whole[box.slices])
            assert got[name].array.dtype == whole.dtype


def test_slices_into_whole_arrays_and_back() -> None:
    stored = save([sliced(box) for box in grid(SHAPE, (4, 1))])
    for like in (ZEROS, None):
        for name, array in restore(stored, like, 0, 1).items():
            np.testing.assert_array_equal(array, VALUES[name])
    whole = save([VALUES])
    (_, second) = grid(SHAPE, (1, 2))
    got = restore(whole, sliced(second, ZEROS), 1, 2)
    np.testing.assert_array_equal(got["w"].array, VALUES["w"][second.slices])


def test_overlapping_slices_of_the_target() -> None:
    stored = save([sliced(box) for box in grid(SHAPE, (2, 2))])
    for offset in range(4):
        box = Box((offset, 1), (9, 6))
        got = restore(stored, sliced(box, ZEROS), offset, 4)
        np.testing.assert_array_equal(got["m"].array, VALUES["m"][box.slices])


def test_a_slice_of_another_whole_is_a_difference() -> None:
    stored = save([sliced(box) for box in grid(SHAPE, (2, 1))])
    like = {"w": Slice(np.zeros((2, 8), np.float32), (2, 8), (0, 0)), "m": VALUES["m"]}
    with pytest.raises(MismatchError, match=r"w: expected float32\[2,8\], found float32\[12,8\]"):
        restore(stored, like)


def test_only_what_is_wanted_is_read() -> None:
    stored = save([sliced(box) for box in grid(SHAPE, (4, 1))])
    first, *_, last = grid(SHAPE, (4, 1))
    flip(stored.store, stored.shard_path(3), 0)
    restore(stored, sliced(first, ZEROS), 0, 4)
    with pytest.raises(DamagedError, match=r"data-00003-of-00005.*'[wm]'"):
        restore(stored, sliced(last, ZEROS), 3, 4)


def test_no_memory_is_taken_for_what_a_cut_off_file_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(name: str, source: Any) -> Any:
        raise AssertionError(f"memory was taken for {name}")

    stored = save([VALUES])
    truncate(stored.store, stored.shard_path(0), 100)
    monkeypatch.setattr(target_values, "_allocate", allocate)
    with pytest.raises(DamagedError, match="is truncated"):
        restore(stored, None)
