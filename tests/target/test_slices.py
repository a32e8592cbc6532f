"""Hand-made slices of any cut, read back in any other on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ckpt.errors import DamagedError, MismatchError, StateError
from ray_ckpt.leaves import Slice, Slices
from ray_ckpt.target import values as target_values
from ray_ckpt.tree import Named
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
CUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 4), (2, 2)]


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


def several(boxes: Sequence[Box], values: Any = VALUES) -> Any:
    """One rank's state: several boxes of each array."""
    return {
        name: Slices(tuple(Slice(array[box.slices].copy(), SHAPE, box.offset) for box in boxes))
        for name, array in values.items()
    }


@pytest.mark.parametrize("after", [((0, 1, 2, 3),), ((0, 3), (1, 2)), ((2,), (3, 1, 0))])
@pytest.mark.parametrize("before", [((0, 1, 2, 3),), ((0, 3), (1, 2)), ((1, 2, 0), (3,))])
def test_several_boxes_on_each_rank(before: tuple[tuple[int, ...], ...], after: tuple[tuple[int, ...], ...]) -> None:
    quarters = grid(SHAPE, (2, 2))
    stored = save([several([quarters[i] for i in mine]) for mine in before])
    for rank, mine in enumerate(after):
        got = restore(stored, several([quarters[i] for i in mine], ZEROS), rank, len(after))
        for name, whole in VALUES.items():
            assert [part.offset for part in got[name].parts] == [quarters[i].offset for i in mine]
            for part, i in zip(got[name].parts, mine, strict=True):
                np.testing.assert_array_equal(part.array, whole[quarters[i].slices])
    for name, array in restore(stored, None).items():
        np.testing.assert_array_equal(array, VALUES[name])


def test_tensorflow_reads_several_boxes_of_a_rank_as_one_tensor(tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    thirds = grid(SHAPE, (3, 1))
    save([Named(several([thirds[0], thirds[2]])), Named(several([thirds[1]]))], tmp_path)
    prefix = str(tmp_path / "model.ckpt-5")
    for name, array in VALUES.items():
        np.testing.assert_array_equal(tf.train.load_checkpoint(prefix).get_tensor(name), array)
    (part,) = tf.raw_ops.RestoreV2(
        prefix=prefix, tensor_names=["w"], shape_and_slices=["12 8 4,4:-"], dtypes=[tf.float32]
    )
    np.testing.assert_array_equal(part.numpy(), VALUES["w"][thirds[1].slices])


def test_boxes_that_two_ranks_share_in_part_are_an_error() -> None:
    with pytest.raises(StateError, match="overlap"):
        save([several(grid(SHAPE, (2, 1))), several([Box((4, 0), (4, 8))])])


def test_names_as_they_are_restore_into_any_state_of_the_same_names() -> None:
    stored = save([Named({"layer/w": VALUES["w"], "step": 3})])
    got = restore(stored, {"layer": {"w": ZEROS["w"]}, "step": 0})
    np.testing.assert_array_equal(got["layer"]["w"], VALUES["w"])
    back = restore(save([{"layer": {"w": VALUES["w"]}, "step": 3}]), Named({"layer/w": ZEROS["w"], "step": 0}))
    assert type(back) is Named
    np.testing.assert_array_equal(back["layer/w"], VALUES["w"])
    whole = restore(stored, None)
    assert type(whole) is Named
    assert list(whole) == ["layer/w", "step"]
    with pytest.raises(MismatchError, match="layer/b"):
        restore(stored, Named({"layer/w": ZEROS["w"], "step": 0, "layer/b": 0}))
