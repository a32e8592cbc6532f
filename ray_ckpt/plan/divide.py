"""Who writes what: the layouts of all ranks -> a plan.

Equal boxes of one tensor on several ranks are replicas, of which one is written. Tensors with the fewest
holders are placed first. Within the tensors of the same holders, the largest goes first, to the least loaded
holder; only where that would push the holder above its fair share is a large one cut, so that as few as
possible end up in slices (which TensorFlow reads more slowly).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from ray_ckpt.bundle import (
    MAX_PARTITIONED_RANK,
    MAX_SLICES,
    UNPARTITIONABLE,
    check_tensor,
    dtype_of,
    nbytes_of,
)
from ray_ckpt.errors import StateError, UsageError
from ray_ckpt.types import Box, Copy, Layout, LeafSpec, Plan, RankPlan, Shape, TensorPlan, WriterRange

MIB = 1 << 20
_PLANNER_VERSION = 2
"""Part of every plan's id: raise it whenever the same layouts and settings are divided otherwise.

A snapshot outlives its coordinator, and its successor's package may be another.
"""

VARIABLE = -1
"""Start and size of a copy whose values decide them."""

_SMALL_NBYTES = 64 << 10
"""Below this, copies are packed behind the large ones: a few long runs copy and stream faster."""

_STRING_WEIGHT = 64
"""Guess of the bytes of one string, to spread string tensors."""

_PIECE_NBYTES = MIB
_MANY_PIECES = 1024
_LARGE_PIECE_NBYTES = 8 * MIB
"""Above so many pieces of one tensor, each is so large: TensorFlow opens the file of every piece that it reads."""

_SHARE_NBYTES = 2 * MIB
"""Where a rank's fair share is smaller, leaves below ``cut_nbytes`` stay whole: nothing is gained by even shares."""

_LEAST_CUT_NBYTES = 256 << 10
_COARSE = 1 / 16
"""Of a fair share: what is smaller hardly makes shares uneven, so it stays whole."""

_PAGE_NBYTES = 4096
_SLACK = 0.02
"""How far above its fair share whole leaves may push a rank before one is cut instead."""

_SHOWN = 8
"""How many ranks an error names."""

_EVEN_STEPS = 16
"""A dimension is long enough to cut where each piece gets this many indices: rounding stays small."""

_KNOWN_EQUAL = ("per_worker:", "slice:", "jax:global")
"""Kinds of leaf of which equal boxes are no presumption but what their owner says."""


@dataclass(slots=True)
class _Tensor:
    """One name over all ranks. ``holders``: per box, the leaf's index in each group that has it."""

    dtype: str
    shape: Shape
    rank: int
    holders: dict[Box, dict[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Item:
    """One box to be written by one of its holders, or cut among them."""

    name: str
    tensor: _Tensor
    box: Box
    nbytes: int


_Groups = list[list[int]]
"""Ranks with equal layouts, so that a thousand data-parallel ranks cost as much as one."""


def make_plan(
    layouts: Sequence[Layout],
    *,
    max_writers_per_rank: int = 2,
    min_writer_nbytes: int = 64 * MIB,
    cut_nbytes: int = 16 * MIB,
) -> Plan:
    """Divide the state of all ranks among them; ``layouts[r]`` is rank r's.

    A rank gets up to ``max_writers_per_rank`` data shards, as long as each has ``min_writer_nbytes``. Leaves
    larger than ``cut_nbytes`` may be cut, and smaller ones that are much of what a rank writes. Deterministic: equal
    layouts and settings give an equal plan.

    Raises:
        StateError: ranks disagree on a tensor's dtype or global shape, its parts leave gaps or overlap, or
            it is beyond TensorFlow's limits. Names the tensor and the ranks.
        UsageError: a setting is not positive.
    """
    if min(max_writers_per_rank, min_writer_nbytes, cut_nbytes) < 1:
        raise UsageError("max_writers_per_rank, min_writer_nbytes and cut_nbytes must be at least 1")
    groups = _group(layouts)
    tensors = _collect(layouts, groups)
    for name, tensor in tensors.items():
        _check(name, tensor, groups)
    boxes: dict[str, list[Box]] = {name: [] for name in tensors}
    owned: list[list[tuple[int, Box]]] = [[] for _ in layouts]
    group_of = {rank: number for number, ranks in enumerate(groups) for rank in ranks}
    for item, rank, box in _assign(tensors, groups, cut_nbytes):
        boxes[item.name].append(box)
        owned[rank].append((item.tensor.holders[item.box][group_of[rank]], box))
    plan_id = _plan_id(layouts, max_writers_per_rank, min_writer_nbytes, cut_nbytes)
    copies = [_ordered_copies(layout.leaves, own) for layout, own in zip(layouts, owned, strict=True)]
    writers = [_writer_ranges(mine, max_writers_per_rank, min_writer_nbytes) for mine in copies]
    copies = [_aligned(mine, ranges) for mine, ranges in zip(copies, writers, strict=True)]
    bases = list(accumulate(map(len, writers), initial=0))
    checks = _checks(layouts, groups, tensors)
    ranks = tuple(
        RankPlan(
            plan_id=plan_id,
            rank=rank,
            copies=copies[rank],
            writers=writers[rank],
            writer_base=bases[rank],
            num_writers=bases[-1],
            fixed_nbytes=max((copy.start + copy.nbytes for copy in copies[rank] if copy.start != VARIABLE), default=0),
            checks=checks[group_of[rank]],
        )
        for rank in range(len(layouts))
    )
    planned = tuple(
        TensorPlan(name, tensor.dtype, tensor.shape, tuple(sorted(boxes[name])))
        for name, tensor in sorted(tensors.items())
    )
    return Plan(plan_id, ranks, planned, bases[-1])


def not_tf_readable(plan: Plan) -> list[str]:
    """Names of tensors that span ranks in a dtype that plain TensorFlow cannot read from slices."""
    return [t.name for t in plan.tensors if len(t.boxes) > 1 and t.dtype in UNPARTITIONABLE]


def _group(layouts: Sequence[Layout]) -> _Groups:
    groups: dict[str, list[int]] = {}
    for rank, layout in enumerate(layouts):
        groups.setdefault(layout.fingerprint, []).append(rank)
    return list(groups.values())


def _collect(layouts: Sequence[Layout], groups: _Groups) -> dict[str, _Tensor]:
    """All tensors by name, with who holds which box."""
    tensors: dict[str, _Tensor] = {}
    unheld: dict[str, dict[int, int]] = {}
    for number, ranks in enumerate(groups):
        for index, leaf in enumerate(layouts[ranks[0]].leaves):
            tensor = tensors.get(leaf.name)
            if tensor is None:
                tensor = tensors[leaf.name] = _Tensor(leaf.dtype, leaf.shape, ranks[0])
            elif tensor.dtype != leaf.dtype or tensor.shape != leaf.shape:
                _raise_disagreement(layouts, leaf.name)
            for box in (Box.whole(leaf.shape),) if 0 in leaf.shape and leaf.boxes else leaf.boxes:
                if box.size or 0 in leaf.shape:
                    tensor.holders.setdefault(box, {})[number] = index
            if 0 in leaf.shape and not leaf.boxes:
                unheld.setdefault(leaf.name, {})[number] = index
    for name, leaves in unheld.items():
        # Somebody writes an empty array that no rank has a part of.
        tensors[name].holders = tensors[name].holders or {Box.whole(tensors[name].shape): leaves}
    return tensors


def _raise_disagreement(layouts: Sequence[Layout], name: str) -> None:
    forms: dict[str, list[str]] = {}
    for rank, layout in enumerate(layouts):
        for leaf in layout.leaves:
            if leaf.name == name:
                forms.setdefault(f"{leaf.dtype}{list(leaf.shape)}", []).append(str(rank))
    told = " but ".join(f"{form} on ranks {', '.join(ranks[:_SHOWN])}" for form, ranks in forms.items())
    raise StateError(
        f"{name}: {told}; a leaf of one name must be the same on every rank, use Slice for parts of one "
        "array and PerWorker for values of each worker's own"
    )


def _check(name: str, tensor: _Tensor, groups: _Groups) -> None:
    boxes = sorted(tensor.holders)
    # A type that TensorFlow cannot read from slices may still span ranks: `not_tf_readable` tells. All else
    # about its slices must hold, so it is checked as a type of no such limit.
    spans = len(boxes) > 1 and tensor.dtype in UNPARTITIONABLE
    try:
        check_tensor(name, "uint8" if spans else tensor.dtype, tensor.shape, boxes)
    except StateError as error:
        holding = {number for leaves in tensor.holders.values() for number in leaves}
        without = sorted(rank for number, ranks in enumerate(groups) if number not in holding for rank in ranks)
        if not without or sum(box.size for box in boxes) >= math.prod(tensor.shape):
            raise
        ranks = ", ".join(map(str, without[:_SHOWN])) + (", ..." if len(without) > _SHOWN else "")
        raise StateError(
            f"{error}; nothing of it is in the state of ranks {ranks}: every process that holds a part"
            " of an array must be a rank of the job and have the leaf in its state"
        ) from None


def _assign(tensors: dict[str, _Tensor], groups: _Groups, cut_nbytes: int) -> Iterable[tuple[_Item, int, Box]]:
    """(item, rank, box) for everything that is written."""
    by_holders: dict[tuple[int, ...], list[_Item]] = {}
    for name, tensor in tensors.items():
        for box, leaves in tensor.holders.items():
            nbytes = nbytes_of(tensor.dtype, box.size)
            item = _Item(name, tensor, box, box.size * _STRING_WEIGHT if nbytes is None else nbytes)
            by_holders.setdefault(tuple(leaves), []).append(item)
    loads = [0] * sum(map(len, groups))
    ranks_of = {held: sorted(rank for number in held for rank in groups[number]) for held in by_holders}
    for held in sorted(by_holders, key=lambda held: (len(ranks_of[held]), ranks_of[held])):
        items = sorted(by_holders[held], key=lambda item: (-item.nbytes, item.name, item.box))
        yield from _share(items, ranks_of[held], loads, cut_nbytes)


def _share(
    items: Sequence[_Item], ranks: Sequence[int], loads: list[int], cut_nbytes: int
) -> Iterable[tuple[_Item, int, Box]]:
    """Share items among ranks that all hold them; adds to ``loads``."""
    level = _fair_level([loads[rank] for rank in ranks], sum(item.nbytes for item in items))
    if level >= _SHARE_NBYTES:
        cut_nbytes = min(cut_nbytes, max(_LEAST_CUT_NBYTES, int(level * _COARSE)))
    heap = [(loads[rank], rank) for rank in ranks]
    heapq.heapify(heap)
    for item in items:
        load, rank = heap[0]
        if load + item.nbytes > level * (1 + _SLACK) and _may_cut(item, len(ranks), cut_nbytes):
            pieces, used = _cut(item, heap, level)
        else:
            pieces, used = [(rank, item.box)], [heapq.heappop(heap)[1]]
        for rank, box in pieces:
            loads[rank] += item.nbytes * box.size // max(1, item.box.size)
            yield item, rank, box
        for rank in used:
            heapq.heappush(heap, (loads[rank], rank))


def _fair_level(loads: Sequence[int], total: int) -> float:
    """The load up to which ``total`` more bytes fill the ranks, poured like water."""
    filled = 0
    ordered = sorted(loads)
    for count, load in enumerate(ordered, 1):
        filled += load
        level = (filled + total) / count
        if count == len(ordered) or level <= ordered[count]:
            return level
    return 0.0


def _may_cut(item: _Item, num_ranks: int, cut_nbytes: int) -> bool:
    tensor = item.tensor
    return (
        num_ranks > 1
        and item.nbytes > cut_nbytes
        and tensor.dtype not in UNPARTITIONABLE
        and len(tensor.shape) <= MAX_PARTITIONED_RANK
        and max(item.box.shape, default=1) > 1
    )


def _cut(item: _Item, heap: list[tuple[int, int]], level: float) -> tuple[list[tuple[int, Box]], list[int]]:
    """(rank, piece) of one box, that fill ranks up to ``level``, least loaded first; and the ranks taken off ``heap``.

    ``heap``: (load, rank).
    """
    left = float(item.nbytes)
    piece = _piece_nbytes(item, len(heap), level)
    most = min(max(item.box.shape), max(1, MAX_SLICES // len(item.tensor.holders)))
    shares: list[tuple[int, float]] = []
    while heap and left > 0 and len(shares) < most:
        load, rank = heap[0]
        share = min(left, level - load)
        if share < min(piece, left):
            # From here on all ranks are full.
            if left <= piece * len(shares):
                break
            share = 0.0
        heapq.heappop(heap)
        shares.append((rank, share))
        left -= share
    # What did not fit below the level goes to all of them alike.
    extra = max(left, 0) / len(shares)
    shape = item.box.shape
    axis = next((d for d, n in enumerate(shape) if n >= _EVEN_STEPS * len(shares)), shape.index(max(shape)))
    ends = [round(shape[axis] * end / item.nbytes) for end in accumulate(share + extra for _, share in shares)]
    ends[-1] = shape[axis]
    pieces = []
    start = 0
    for (rank, _), end in zip(shares, ends, strict=True):
        if end > start:
            pieces.append((rank, _span(item.box, axis, start, end)))
            start = end
    return pieces, [rank for rank, _ in shares]


def _piece_nbytes(item: _Item, num_ranks: int, level: float) -> float:
    """Below this a piece is not worth a slice."""
    nbytes = max(_LEAST_CUT_NBYTES, min(_PIECE_NBYTES, level * _COARSE / 2))
    if num_ranks > _MANY_PIECES:
        nbytes = max(nbytes, min(_LARGE_PIECE_NBYTES, item.nbytes / _MANY_PIECES))
    return nbytes


def _span(box: Box, axis: int, start: int, stop: int) -> Box:
    """Indices ``start`` to ``stop`` of the box along one axis."""
    offset = (*box.offset[:axis], box.offset[axis] + start, *box.offset[axis + 1 :])
    return Box(offset, (*box.shape[:axis], stop - start, *box.shape[axis + 1 :]))


def _ordered_copies(leaves: Sequence[LeafSpec], owned: Sequence[tuple[int, Box]]) -> tuple[Copy, ...]:
    """Large ones, small ones, strings; each by falling element size, which keeps elements aligned."""
    keyed = []
    for leaf, box in owned:
        dtype = leaves[leaf].dtype
        nbytes = nbytes_of(dtype, box.size)
        rank = 2 if nbytes is None else int(nbytes < _SMALL_NBYTES)
        keyed.append(((rank, -dtype_of(dtype).itemsize, leaf, box), nbytes))
    keyed.sort()
    copies = []
    start = 0
    for (_, _, leaf, box), nbytes in keyed:
        if nbytes is None:
            copies.append(Copy(leaf, box, VARIABLE, VARIABLE))
        else:
            copies.append(Copy(leaf, box, start, nbytes))
            start += nbytes
    return tuple(copies)


def _writer_ranges(copies: Sequence[Copy], most: int, min_nbytes: int) -> tuple[WriterRange, ...]:
    """Consecutive copies for each writer, of about equal size."""
    if not copies:
        return ()
    ends = list(accumulate(max(copy.nbytes, 0) for copy in copies))
    count = max(1, min(most, ends[-1] // min_nbytes))
    cuts = {0, len(copies)}
    for part in range(1, count):
        target = ends[-1] * part / count
        at = bisect_left(ends, target)
        over, under = ends[at] - target, target - (ends[at - 1] if at else 0)
        cuts.add(at + 1 if over <= under else at)
    bounds = sorted(cuts)
    return tuple(WriterRange(first, stop) for first, stop in pairwise(bounds))


def _aligned(copies: Sequence[Copy], writers: Sequence[WriterRange]) -> tuple[Copy, ...]:
    """The copies with each writer's bytes starting on a page, so that they can go to a disk past the page cache."""
    moved: list[Copy] = []
    shift = 0
    for writer in writers:
        mine = copies[writer.first : writer.stop]
        if mine[0].start != VARIABLE:
            shift += -(mine[0].start + shift) % _PAGE_NBYTES
        moved += [copy if copy.start == VARIABLE else replace(copy, start=copy.start + shift) for copy in mine]
    return tuple(moved)


def _checks(layouts: Sequence[Layout], groups: _Groups, tensors: dict[str, _Tensor]) -> list[tuple[int, ...]]:
    """Per group, its plain leaves that more than one rank holds."""
    found: list[tuple[int, ...]] = []
    for number, ranks in enumerate(groups):
        indices = []
        for index, leaf in enumerate(layouts[ranks[0]].leaves):
            if leaf.kind.startswith(_KNOWN_EQUAL):
                continue
            held = tensors[leaf.name].holders.get(Box.whole(leaf.shape), {})
            if number in held and sum(len(groups[other]) for other in held) > 1:
                indices.append(index)
        found.append(tuple(indices))
    return found


def _plan_id(layouts: Sequence[Layout], *settings: int) -> str:
    text = "\n".join([*(layout.fingerprint for layout in layouts), *map(str, settings), f"v{_PLANNER_VERSION}"])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
