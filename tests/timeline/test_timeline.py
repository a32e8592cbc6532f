"""Timelines: what the coordinator writes is what `timelines` gives back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ray_ckpt.coordinator.executor import encode_timeline, timeline_path
from ray_ckpt.protocol.messages import SegmentInfo
from ray_ckpt.protocol.save_state import SaveState
from ray_ckpt.storage import Store, open_store
from ray_ckpt.timeline import ShardSpan, SnapshotSpan, Timeline, timelines
from ray_ckpt.types import ShardReport


def save(step: int, attempt: str) -> SaveState:
    """A save of two ranks; rank 1 has two writers, and the second one's first try failed."""
    segments = {
        rank: SegmentInfo(rank, 1, step, 2, "p", "cadence", 1 + rank, rank, 3, due=10.0 + rank, sealed=10.5 + rank)
        for rank in (0, 1)
    }
    shards = {
        writer: ShardReport(attempt, writer, int(writer == 2), 9, "x", 100, b"", b"", 0.25, f"host{writer}", 20.0)
        for writer in (0, 1, 2)
    }
    state = SaveState((1, step), attempt, "p", 2, 3, 4, 9.0, 99.0, prefix=f"model.ckpt-{step}")
    state.segments.update(segments)
    state.shards.update(shards)
    return state


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The store of a run's directory."""
    return open_store(tmp_path / "run")


def keep(store: Store, step: int, attempt: str, committed: float) -> None:
    """Write a save's timeline where the coordinator does."""
    store.put(timeline_path(attempt), encode_timeline(save(step, attempt), committed))


def test_what_was_written_comes_back(store: Store) -> None:
    keep(store, 7, "e1-1", 30.0)
    shards = [(0, 0, "host0", 0), (1, 1, "host1", 0), (2, 1, "host2", 1)]
    assert timelines(store.url) == [
        Timeline(
            step=7,
            generation=1,
            attempt="e1-1",
            prefix="model.ckpt-7",
            opened=9.0,
            committed=30.0,
            snapshots=(SnapshotSpan(0, 10.0, 10.5, "cadence"), SnapshotSpan(1, 11.0, 11.5, "cadence")),
            shards=tuple(ShardSpan(*shard, 100, 20.0, 20.25) for shard in shards),
        )
    ]


def test_they_come_in_the_order_of_their_commits(store: Store) -> None:
    for step, attempt, committed in ((3, "e2-1", 50.0), (9, "e1-10", 40.0), (5, "e1-9", 30.0)):
        keep(store, step, attempt, committed)
    assert [timeline.step for timeline in timelines(store.url)] == [5, 9, 3]


def test_a_directory_without_saves_has_none(store: Store) -> None:
    assert timelines(store.url) == []


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"{}", b'{"step": "x"}'])
def test_what_is_no_timeline_is_left_out_with_a_warning(
    store: Store, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    keep(store, 7, "e1-1", 30.0)
    store.put(timeline_path("e1-2"), raw)
    with caplog.at_level(logging.WARNING):
        assert [timeline.step for timeline in timelines(store.url)] == [7]
    assert "e1-2.json is not a timeline" in caplog.text
