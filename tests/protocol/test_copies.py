"""Copies on a peer come after saves, and one that fails holds up nothing."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.protocol.host import HostLogic, Keep, Mirror
from ray_ckpt.protocol.messages import HostView, JobConfig, SegmentInfo, WorkerReport
from ray_ckpt.types import Generation
from tests.protocol.test_recall import Memory, part

VIEW = HostView(1, 1, peer="b", directory="")
CONFIG = JobConfig(world_size=2, replicas=1)


def host(*segments: SegmentInfo) -> HostLogic:
    """Rank 0's host, with these in its memory."""
    logic = HostLogic("a", "1")
    logic.on_worker(WorkerReport("w", 1, 0, CONFIG, generation=3))
    logic.on_view(VIEW)
    logic.on_segments(segments)
    return logic


def memory(step: int) -> SegmentInfo:
    """A snapshot of rank 0 for a restart alone."""
    return replace(part(0, 3, step), trigger="memory", writers=0)


def test_what_awaits_its_copy_stays_until_it_is_made() -> None:
    first, second = memory(10), memory(20)
    logic = host(first, second)
    # Only the newest: the older one's time is over.
    assert logic.take() == [Keep(first), Mirror(second, "b")]
    assert logic.take() == [Keep(first)]
    logic.on_mirrored(second, whole=True)
    assert Keep(second) in logic.take()


def test_a_save_that_waits_for_memory_goes_before_copies() -> None:
    first, second = memory(10), memory(20)
    logic = host(first, second)
    logic.take()
    logic.on_worker(WorkerReport("w", 2, 0, CONFIG, generation=3, due_step=30))
    assert Keep(second) in logic.take(), "though it is being copied"
    logic.on_worker(WorkerReport("w", 3, 0, CONFIG, generation=3))
    assert Keep(second) not in logic.take()


def test_what_is_still_to_be_saved_is_copied_whoever_waits() -> None:
    undecided = part(0, 3, 20)
    logic = host(undecided)
    logic.on_worker(WorkerReport("w", 2, 0, CONFIG, generation=3, due_step=30))
    assert logic.take() == [Mirror(undecided, "b")]


def test_a_copy_that_fails_is_told_and_lets_the_snapshot_go() -> None:
    only = memory(10)
    logic = host(only)
    assert logic.take() == [Mirror(only, "b")]
    assert not logic.report().segments[0].alone
    logic.on_mirrored(only, whole=False)
    assert logic.news
    assert logic.report().segments[0].alone
    assert logic.take() == [Keep(only)]


def test_snapshots_before_one_whose_copies_have_failed_are_not_kept_for_its_sake() -> None:
    held = Memory(Generation(3, 2, None))
    older = [part(rank, 3, 20) for rank in range(2)]
    newer = [part(rank, 3, 30) for rank in range(2)]
    copies = [replace(s, replica=True, name=f"copy-{s.name}") for s in (*older, newer[0])]
    held.hold("h0", older[0], newer[0], copies[1])
    held.hold("h1", older[1], newer[1], copies[0], copies[2])
    assert held.recall.newest_settled == (3, 20)
    held.hold("h1", older[1], replace(newer[1], alone=True), copies[0], copies[2])
    assert held.recall.newest_settled == (3, 30)
    assert held.recall.newest_doubled == (3, 20)
