"""The plan that snapshots were taken by, made again by a coordinator that may be of another version."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.errors import SaveError
from ray_ckpt.plan import divide, make_plan
from ray_ckpt.protocol.messages import SegmentInfo
from ray_ckpt.protocol.planner import Planner, replica_mismatch
from ray_ckpt.types import IN_PART, Box, Layout, LeafSpec

LAYOUTS = [
    Layout((LeafSpec(f"w{rank}", "float32", (8,), (Box.whole((8,)),), "numpy"),), "{}", f"layout-{rank}")
    for rank in range(3)
]


def planner() -> Planner:
    """A coordinator's that has just heard all layouts again."""
    found = Planner()
    found.layouts.update({layout.fingerprint: layout for layout in LAYOUTS})
    return found


def segment(rank: int, plan_id: str) -> SegmentInfo:
    mine = make_plan(LAYOUTS).ranks[rank]
    return SegmentInfo(
        rank=rank,
        generation=0,
        step=7,
        world_size=len(LAYOUTS),
        plan_id=plan_id,
        trigger="cadence",
        writers=len(mine.writers),
        writer_base=mine.writer_base,
        num_writers=mine.num_writers,
        fingerprint=LAYOUTS[rank].fingerprint,
        name=f"segment-{rank}",
    )


def test_snapshots_of_the_same_version_have_their_plan_again() -> None:
    plan = make_plan(LAYOUTS)
    segments = {rank: segment(rank, plan.plan_id) for rank in range(len(LAYOUTS))}
    assert planner().plan_of(segments) == (plan, LAYOUTS)


def test_snapshots_that_another_version_divided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divide, "_PLANNER_VERSION", divide._PLANNER_VERSION - 1)
    earlier = make_plan(LAYOUTS).plan_id
    monkeypatch.undo()
    segments = {rank: segment(rank, earlier) for rank in range(len(LAYOUTS))}
    with pytest.raises(SaveError, match=r"step 7: the snapshot was divided by another version .*ranks 0, 1, 2\)"):
        planner().plan_of(segments)


@pytest.mark.parametrize(
    ("first", "second", "differ"),
    [("w", "w", True), ("w" + IN_PART, "w" + IN_PART, True), ("w", "w" + IN_PART, False), ("w" + IN_PART, "w", False)],
)
def test_digests_of_the_whole_and_of_parts_are_not_compared(first: str, second: str, differ: bool) -> None:
    # One rank has taken part in a save before, which the other was too late for.
    segments = {
        rank: replace(segment(rank, "plan"), digests=((name, rank),)) for rank, name in enumerate((first, second))
    }
    found = replica_mismatch(segments)
    assert (found is not None) is differ
    assert found is None or found.startswith("'w' has different values on rank 0 and rank 1")
