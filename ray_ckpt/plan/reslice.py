"""Reslicing for a restore: which stored pieces of a tensor hold a wanted box."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ray_ckpt.errors import DamagedError
from ray_ckpt.types import Box


class PieceIndex:
    """Finds the stored pieces of one tensor that a wanted box touches, without looking at the others.

    ``pieces`` are disjoint boxes. Built in O(n log n); a query costs little more than what it finds.
    """

    def __init__(self, pieces: Sequence[Box], name: str = "a tensor") -> None:
        self._pieces = pieces
        self._name = name
        rank = len(pieces[0].shape) if pieces else 0
        spans = [{(box.offset[d], box.shape[d]) for box in pieces} for d in range(rank)]
        self._axes = [d for d in range(rank) if len(spans[d]) > 1]
        self._root = _Level(pieces, range(len(pieces)), self._axes)

    def intersections(self, wanted: Box) -> list[tuple[int, Box]]:
        """(index of the piece, common box) of all pieces, in their order; together the wanted box.

        Raises:
            DamagedError: the pieces do not cover it.
        """
        if not wanted.size:
            return []
        found: list[tuple[int, Box]] = []
        covered = 0
        for index in sorted(self._root.find(wanted)):
            common = self._pieces[index].intersect(wanted)
            if common is not None:
                found.append((index, common))
                covered += common.size
        if covered != wanted.size:
            raise DamagedError(
                f"{self._name}: the stored pieces hold {covered} of the {wanted.size} elements at offset "
                f"{wanted.offset} with shape {wanted.shape}; the index is incomplete, use another checkpoint"
            )
        return found


def intersections(wanted: Box, pieces: Sequence[Box]) -> list[tuple[int, Box]]:
    """`PieceIndex.intersections` for a single question."""
    return PieceIndex(pieces).intersections(wanted)


class _Level:
    """Pieces grouped by their span along one axis and sorted by it; each group is a level of the next."""

    __slots__ = ("axis", "below", "pieces", "reach", "starts", "stops")

    def __init__(self, boxes: Sequence[Box], pieces: Sequence[int], axes: Sequence[int]) -> None:
        self.pieces = pieces
        self.axis = axes[0] if axes else None
        if self.axis is None:
            return
        spans: dict[tuple[int, int], list[int]] = {}
        for index in pieces:
            box = boxes[index]
            start = box.offset[self.axis]
            spans.setdefault((start, start + box.shape[self.axis]), []).append(index)
        ordered = sorted(spans)
        self.starts = [start for start, _ in ordered]
        self.stops = [stop for _, stop in ordered]
        # The furthest stop so far rises, so that it can be searched where the stops themselves do not.
        self.reach = list(accumulate(self.stops, max))
        self.below = [_Level(boxes, spans[span], axes[1:]) for span in ordered]

    def find(self, wanted: Box) -> Iterable[int]:
        """Indices of the pieces that touch ``wanted`` along this level's axes."""
        if self.axis is None:
            yield from self.pieces
            return
        start = wanted.offset[self.axis]
        stop = start + wanted.shape[self.axis]
        for at in range(bisect_right(self.reach, start), bisect_left(self.starts, stop)):
            if self.stops[at] > start:
                yield from self.below[at].find(wanted)
