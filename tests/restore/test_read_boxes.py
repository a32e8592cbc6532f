"""Reading boxes: right to the bit, whatever the slicing, and with no more reads than needed."""

from __future__ import annotations

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_ckpt.bundle import DTYPE_NAMES, dtype_of
from ray_ckpt.errors import MismatchError, ObjectMissingError, UsageError
from ray_ckpt.restore import open_checkpoint, read_boxes
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import Box
from tests.restore.make import grid, make_checkpoint, random_bits, same_bits, some_metadata
from tests.restore.watch import watch

MIB = 1 << 20


def read(store: Store, name: str, box: Box, dtype: Any, **how: Any) -> np.ndarray[Any, Any]:
    """One box of one tensor of the checkpoint "c"."""
    out = np.empty(box.shape, dtype)
    read_boxes(open_checkpoint(store, "c"), [(name, box, out)], **how)
    return out


@pytest.mark.parametrize("name", sorted(DTYPE_NAMES))
@pytest.mark.parametrize("shape", [(), (7,), (3, 0, 2), (5, 6)])
def test_every_type_and_shape_comes_back(store: Store, name: str, shape: tuple[int, ...], seed: int) -> None:
    array = random_bits(dtype_of(name), shape, seed)
    make_checkpoint(store, "c", {"w": array})
    assert same_bits(read(store, "w", Box.whole(shape), array.dtype), array)


@pytest.mark.parametrize("stored_as", [(4, 1), (1, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("wanted_as", [(3, 1), (1, 3), (1, 1), (6, 5)])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(object)])
def test_any_slicing_becomes_any_other(
    store: Store, seed: int, stored_as: tuple[int, int], wanted_as: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    array = random_bits(dtype, (12, 20), seed)
    make_checkpoint(store, "c", {"w": array}, {"w": grid(array.shape, stored_as)}, metadata=some_metadata())
    stored = open_checkpoint(store, "c")
    for box in grid(array.shape, wanted_as):
        out = np.empty(box.shape, dtype)
        read_boxes(stored, [("w", box, out)])
        assert same_bits(out, array[box.slices])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_large_pieces_are_read_in_parts(store: Store, small_units: int, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    parts = tuple(data.draw(st.integers(1, min(3, n))) for n in shape)
    array = random_bits(np.dtype(np.uint16), shape, data.draw(st.integers(0, 9)))
    metadata = data.draw(st.sampled_from([some_metadata(), None]))
    make_checkpoint(store, "c", {"w": array}, {"w": grid(shape, parts)}, metadata=metadata, chunk_nbytes=small_units)
    boxes = []
    for _ in range(data.draw(st.integers(1, 3))):
        offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        extent = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))
        boxes.append(Box(offset, extent))
    order = data.draw(st.sampled_from("CF"))
    outs = [np.empty(box.shape, np.uint16, order) for box in boxes]
    budget = data.draw(st.sampled_from([1, 500, 1 << 20]))
    wanted = [("w", box, out) for box, out in zip(boxes, outs, strict=True)]
    read_boxes(open_checkpoint(store, "c"), wanted, threads=2, budget_nbytes=budget)
    for box, out in zip(boxes, outs, strict=True):
        assert same_bits(out, array[box.slices])


def test_only_the_chunks_that_hold_the_part_are_read(store: Store, small_units: int) -> None:
    array = np.arange(1000, dtype=np.uint8).reshape(100, 10)
    make_checkpoint(store, "c", {"w": array}, metadata=some_metadata(), chunk_nbytes=small_units)
    stored = open_checkpoint(store, "c")
    seen = watch(store)
    out = np.empty((5, 10), np.uint8)
    read_boxes(stored, [("w", Box((50, 0), (5, 10)), out)])
    assert same_bits(out, array[50:55])
    assert seen.nbytes == 2 * small_units


def test_without_chunk_checksums_the_whole_piece_is_read_to_verify_a_part(store: Store, small_units: int) -> None:
    array = np.arange(1000, dtype=np.uint8)
    make_checkpoint(store, "c", {"w": array})
    stored = open_checkpoint(store, "c")
    seen = watch(store)
    assert same_bits(read(store, "w", Box((5,), (10,)), np.uint8), array[5:15])
    assert seen.nbytes == array.nbytes
    assert stored.chunk_crcs == {}


def test_a_piece_that_several_want_is_read_once(store: Store) -> None:
    array = np.arange(2 * MIB, dtype=np.uint8)
    make_checkpoint(store, "c", {"w": array})
    stored = open_checkpoint(store, "c")
    seen = watch(store)
    halves = grid(array.shape, (2,))
    outs = [np.empty(MIB, np.uint8) for _ in halves]
    read_boxes(stored, [("w", box, out) for box, out in zip(halves, outs, strict=True)])
    assert seen.nbytes == array.nbytes
    assert same_bits(np.concatenate(outs), array)


def test_large_pieces_go_straight_into_the_target(store: Store) -> None:
    array = np.arange(3 * MIB, dtype=np.uint8).reshape(3, MIB)
    make_checkpoint(store, "c", {"w": array}, {"w": grid(array.shape, (3, 1))})
    stored = open_checkpoint(store, "c")
    seen = watch(store)
    out = np.empty((2, MIB), np.uint8)
    read_boxes(stored, [("w", Box((1, 0), (2, MIB)), out)])
    assert same_bits(out, array[1:])
    assert seen.buffers
    # A piece of exactly one MiB may be packed with its neighbours; what is larger may not be copied.
    big = np.empty((3, MIB + 8), np.uint8)
    make_checkpoint(store, "c", {"w": np.zeros_like(big)})
    stored = open_checkpoint(store, "c")
    seen.buffers.clear()
    read_boxes(stored, [("w", Box.whole(big.shape), big)])
    assert all(np.shares_memory(buffer, big) for buffer in seen.buffers)


def test_small_neighbours_are_read_together(store: Store) -> None:
    arrays = {f"layer/{i}": np.full(256, i, np.float32) for i in range(20_000)}
    make_checkpoint(store, "c", arrays, metadata=some_metadata())
    stored = open_checkpoint(store, "c")
    outs = {name: np.empty(256, np.float32) for name in arrays}
    seen = watch(store)
    read_boxes(stored, [(name, Box.whole((256,)), out) for name, out in outs.items()])
    assert len(seen.reads) <= 6
    assert all(same_bits(outs[name], arrays[name]) for name in arrays)


def test_far_neighbours_are_not_read_together(store: Store) -> None:
    arrays = {"a": np.ones(4), "between": np.ones(MIB, np.uint8), "b": np.ones(4)}
    make_checkpoint(store, "c", arrays, num_shards=2)
    stored = open_checkpoint(store, "c")
    seen = watch(store)
    outs = {name: np.empty(4) for name in ("a", "b")}
    read_boxes(stored, [(name, Box.whole((4,)), out) for name, out in outs.items()])
    assert sorted(nbytes for _, _, nbytes in seen.reads) == [32, 32]


def test_packs_are_not_larger_than_other_reads(store: Store, small_units: int) -> None:
    arrays = {f"{i:02d}": np.full(20, i, np.uint8) for i in range(60)}
    make_checkpoint(store, "c", arrays)
    stored = open_checkpoint(store, "c")
    outs = {name: np.empty(20, np.uint8) for name in arrays}
    seen = watch(store)
    read_boxes(stored, [(name, Box.whole((20,)), out) for name, out in outs.items()])
    assert max(nbytes for _, _, nbytes in seen.reads) == 120 <= 2 * small_units
    assert all(same_bits(outs[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(("threads", "budget_nbytes", "at_once"), [(8, 600, 4), (3, 1 << 20, 3)])
def test_no_more_runs_than_threads_and_budget_allow(
    store: Store, small_units: int, threads: int, budget_nbytes: int, at_once: int
) -> None:
    array = np.arange(20_000, dtype=np.uint8).reshape(100, 200)
    make_checkpoint(store, "c", {"w": array})
    stored = open_checkpoint(store, "c")
    out = np.empty(array.shape, np.uint8, "F")  # no read can go straight in: 64 bytes cost 128
    started, go_on = threading.Semaphore(0), threading.Event()
    inner = store.read_into

    def read_into(path: str, start: int, buffer: memoryview) -> None:
        started.release()
        assert go_on.wait(60)
        inner(path, start, buffer)

    store.read_into = read_into  # type: ignore[method-assign]
    wanted = [("w", Box.whole(array.shape), out)]
    how = {"threads": threads, "budget_nbytes": budget_nbytes}
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(read_boxes, stored, wanted, **how)
        try:
            assert all(started.acquire(timeout=60) for _ in range(at_once))
            assert not started.acquire(timeout=0.3)
        finally:
            go_on.set()
        done.result(60)
    assert same_bits(out, array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_beside_the_targets_stays_within_the_budget(tmp_path: Path, order: Any) -> None:
    shape, budget = (64, MIB), 48 * MIB
    store = open_store(tmp_path)
    for step in range(4):
        array = np.full(shape, step, np.uint8)
        make_checkpoint(store, f"c{step}", {"w": array}, {"w": grid(shape, (1, 2))}, num_shards=2)
    stored = [open_checkpoint(store, f"c{step}") for step in range(4)]
    outs = [np.empty(shape, np.uint8, order) for _ in stored]
    tracemalloc.start()
    try:
        for checkpoint, out in zip(stored, outs, strict=True):
            read_boxes(checkpoint, [("w", Box.whole(shape), out)], budget_nbytes=budget)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < budget
    assert all((out == step).all() for step, out in enumerate(outs))


def test_progress_counts_up_to_all_bytes(store: Store, small_units: int) -> None:
    make_checkpoint(store, "c", {"w": np.zeros(1000, np.uint8), "v": np.zeros(10, np.uint8)})
    told: list[tuple[int, int]] = []
    wanted = [(name, Box.whole((n,)), np.empty(n, np.uint8)) for name, n in (("w", 1000), ("v", 10))]
    read_boxes(open_checkpoint(store, "c"), wanted, progress=lambda *numbers: told.append(numbers))
    assert told == sorted(told)
    assert told[-1] == (1010, 1010)


@pytest.mark.parametrize(
    ("box", "out", "text"),
    [
        (Box((0,), (4,)), np.empty(4, np.float64), "is float32.*found a float64"),
        (Box((0,), (4,)), np.empty(4, ">f4"), "is float32"),
        (Box((0,), (4,)), np.empty(5, np.float32), r"found a float32 array of shape \(5,\)"),
        (Box((2,), (4,)), np.empty(4, np.float32), "not inside"),
        (Box((-1,), (4,)), np.empty(4, np.float32), "not inside"),
        (Box((), ()), np.empty((), np.float32), "not inside"),
        (Box((0,), (4,)), np.broadcast_to(np.float32(0), (4,)), "read-only"),
    ],
)
def test_what_does_not_fit_is_refused(store: Store, box: Box, out: Any, text: str) -> None:
    make_checkpoint(store, "c", {"w": np.zeros(4, np.float32)})
    with pytest.raises(MismatchError, match=text):
        read_boxes(open_checkpoint(store, "c"), [("w", box, out)])


def test_an_unknown_name_is_answered_with_similar_ones(store: Store) -> None:
    make_checkpoint(store, "c", {"params/kernel": np.zeros(4, np.float32)})
    with pytest.raises(UsageError, match="did you mean 'params/kernel'"):
        read(store, "params/kernal", Box.whole((4,)), np.float32)


@pytest.mark.parametrize("how", [{"threads": 0}, {"budget_nbytes": 0}, {"threads": -1}])
def test_numbers_that_make_no_sense_are_refused(store: Store, how: dict[str, int]) -> None:
    make_checkpoint(store, "c", {"w": np.zeros(4, np.float32)})
    with pytest.raises(UsageError, match="positive"):
        read(store, "w", Box.whole((4,)), np.float32, **how)


def test_a_missing_shard_is_the_callers_to_judge(store: Store) -> None:
    make_checkpoint(store, "c", {"w": np.zeros(4, np.float32)})
    stored = open_checkpoint(store, "c")
    store.delete(stored.shard_path(0))
    with pytest.raises(ObjectMissingError, match=r"c\.data-00000-of-00004"):
        read_boxes(stored, [("w", Box.whole((4,)), np.empty(4, np.float32))])
