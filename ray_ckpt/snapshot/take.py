"""The copy of a rank's share of the state into a segment, in the training thread: one pass, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ray_ckpt.bundle import crc32c, dtype_of, encode_objects, nbytes_of
from ray_ckpt.errors import SaveError, StorageError
from ray_ckpt.leaves import parts, read_box, start_transfers
from ray_ckpt.snapshot.segment import Segment
from ray_ckpt.snapshot.table import Place, SaveId, encode_table
from ray_ckpt.types import IN_PART, Box, Layout, LeafSpec, RankPlan, Shape

_LARGE_NBYTES = 1 << 20
_CHUNK_NBYTES = 16 << 20
_PARALLEL_NBYTES = 64 << 20
"""Below this a second thread costs more than it gains."""

_SAMPLED_LEAVES = 512
"""About how many replicas a save digests in part; which ones changes from step to step."""

_SAMPLES = 8
_SAMPLE_NBYTES = 4096

_Array = NDArray[Any]
_Move = tuple[_Array, _Array]


class SegmentTooSmallError(StorageError):
    """The state has outgrown the segment; ``needed_nbytes`` is what its data region must hold."""

    def __init__(self, segment: Segment, needed: int) -> None:
        super().__init__(
            f"{segment.path}: the snapshot needs {needed} bytes, the segment holds {segment.data_nbytes}; "
            "make a larger one"
        )
        self.needed_nbytes = needed


def needed_nbytes(plan: RankPlan, layout: Layout, values: Sequence[Any]) -> int:
    """Size in bytes of the data region for this rank's share, strings as long as they are now."""
    strings = _encode_strings(plan, layout, values)
    return plan.fixed_nbytes + sum(len(blob) for blob, _, _ in strings)


def take_snapshot(
    segment: Segment,
    plan: RankPlan,
    layout: Layout,
    values: Sequence[Any],
    save: SaveId,
    *,
    full_digests: bool = False,
    keep: bool = False,
    threads: int = 2,
) -> dict[str, int]:
    """Copy this rank's share of the state into the segment and seal it; the state may change afterwards.

    ``values`` are the leaves in the layout's order. Returns the digests of the plan's ``checks`` by name
    (uint32): of all of them, whole, with ``full_digests`` (a generation's first save), else of a sample that
    depends on names and step alone, so that all ranks digest the same parts, under names that end in `IN_PART`.
    ``keep``: no save needs it, only a restart may, see `Segment.seal`.

    Raises:
        SaveError: plan, layout and save id do not belong together, or the segment is still sealed.
        SegmentTooSmallError: the data does not fit.
    """
    if (save.plan_id, save.rank, len(layout.leaves)) != (plan.plan_id, plan.rank, len(values)):
        raise SaveError(f"step {save.step}: the plan is not that of this state and rank {save.rank}; plan again")
    start_transfers((values[copy.leaf], copy.box) for copy in plan.copies if copy.start >= 0)
    strings = _encode_strings(plan, layout, values)
    needed = plan.fixed_nbytes + sum(len(blob) for blob, _, _ in strings)
    if needed > segment.data_nbytes:
        raise SegmentTooSmallError(segment, needed)
    with segment.fill(save):
        _copy_fixed(segment, plan, layout, values, threads)
        places = _append_strings(segment, plan.fixed_nbytes, strings)
        checked = plan.checks if full_digests else _sampled(plan.checks, layout, save.step)
        step, kind = (None, "") if full_digests else (save.step, IN_PART)
        digests = {layout.leaves[i].name + kind: _digest(values[i], layout.leaves[i], step) for i in checked}
        segment.seal(encode_table(save, plan, layout, places, digests), keep=keep)
    return digests


def _copy_fixed(segment: Segment, plan: RankPlan, layout: Layout, values: Sequence[Any], threads: int) -> None:
    """Copy all leaves of a fixed size: small ones here and now, the chunks of large ones by all threads."""
    data, leaves = segment.data, layout.leaves
    large: list[_Move] = []
    for copy in plan.copies:
        if copy.start < 0:
            break
        box = copy.box
        target: _Array = np.ndarray(box.shape, dtype_of(leaves[copy.leaf].dtype), data, copy.start)
        for part, source in parts(values[copy.leaf], box):
            into = target if part is box or part == box else target[part.relative_to(box).slices]
            if source.nbytes < _LARGE_NBYTES:
                np.copyto(into, source, "equiv")
            else:
                large.append((into, source))
    moves = iter([chunk for into, source in large for chunk in _chunks(into, source)])
    helpers = threads - 1 if sum(source.nbytes for _, source in large) > _PARALLEL_NBYTES else 0
    if not helpers:
        _run(moves)
        return
    with ThreadPoolExecutor(helpers) as pool:
        # numpy releases the interpreter lock while it copies; the shared iterator balances the threads.
        running = [pool.submit(_run, moves) for _ in range(helpers)]
        _run(moves)
        for future in running:
            future.result()


def _run(moves: Iterator[_Move]) -> None:
    for into, source in moves:
        np.copyto(into, source, "equiv")


def _chunks(into: _Array, source: _Array) -> Iterator[_Move]:
    """Pieces of one copy, of about `_CHUNK_NBYTES`."""
    if into.dtype == source.dtype and into.flags.c_contiguous and source.flags.c_contiguous:
        # As bytes: numpy copies other dtypes element by element where the target is not aligned.
        into, source = into.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)
    elif not source.ndim:
        yield into, source
        return
    rows = max(1, _CHUNK_NBYTES * len(source) // source.nbytes)
    for start in range(0, len(source), rows):
        yield into[start : start + rows], source[start : start + rows]


def _encode_strings(plan: RankPlan, layout: Layout, values: Sequence[Any]) -> list[tuple[bytes, int, Shape]]:
    """The bytes, crc and shape of each copy without a fixed size, which all come last."""
    found = []
    for copy in plan.copies:
        if copy.start < 0:
            leaf = layout.leaves[copy.leaf]
            array = read_box(values[copy.leaf], leaf, copy.box)
            found.append((*encode_objects(leaf.dtype, array, array.shape), array.shape))
    return found


def _append_strings(segment: Segment, start: int, strings: Sequence[tuple[bytes, int, Shape]]) -> list[Place]:
    places = []
    for blob, crc, shape in strings:
        segment.data[start : start + len(blob)] = blob
        places.append(Place(start, len(blob), crc, shape))
        start += len(blob)
    return places


def _sampled(checks: Sequence[int], layout: Layout, step: int) -> list[int]:
    """The checks whose turn it is at this step. Their number is rounded so that ranks mostly agree."""
    turns = 1
    while turns * _SAMPLED_LEAVES < len(checks):
        turns *= 2
    return [i for i in checks if (crc32(layout.leaves[i].name.encode()) + step) % turns == 0]


def _digest(value: Any, spec: LeafSpec, step: int | None) -> int:
    """crc32c of the leaf's elements, little-endian in C order: all, or the samples of a step."""
    whole = Box.whole(spec.shape)
    if nbytes_of(spec.dtype, 1) is None:
        array = read_box(value, spec, whole)
        return encode_objects(spec.dtype, array, array.shape)[1]
    dtype = dtype_of(spec.dtype)
    if step is None or whole.size * dtype.itemsize <= _SAMPLES * _SAMPLE_NBYTES:
        boxes = [whole]
    else:
        boxes = [_sample_box(spec.shape, dtype.itemsize, step * _SAMPLES + i) for i in range(_SAMPLES)]
    crc = 0
    for box in boxes:
        array = np.ascontiguousarray(read_box(value, spec, box), dtype)
        crc = crc32c(array.reshape(-1).view(np.uint8).data, crc)
    return crc


def _sample_box(shape: Shape, itemsize: int, number: int) -> Box:
    """A run of up to `_SAMPLE_NBYTES` of neighbours somewhere in the array, spread evenly by ``number``."""
    room = _SAMPLE_NBYTES // itemsize
    offset: list[int] = []
    extent: list[int] = []
    for axis in reversed(range(len(shape))):
        length = min(shape[axis], max(1, room))
        room //= shape[axis]
        # Multiples of the golden ratio visit an interval evenly in any number of steps.
        at = int((number + 1) * (axis + 1) * 0.6180339887498949 % 1 * (shape[axis] - length + 1))
        offset.insert(0, at)
        extent.insert(0, length)
    return Box(tuple(offset), tuple(extent))
