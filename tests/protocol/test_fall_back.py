"""What all ranks take where one cannot read what was chosen: the newest that is whole elsewhere, by a new decision."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.protocol.messages import RestoreResult
from tests.protocol.harness import Job, World, beat
from tests.protocol.loop import TWO
from tests.protocol.test_deleted import snapshot

CONFIG = replace(TWO, memory_steps=10)


class Restarted:
    """A job that was killed, and the next start of it on the same machines, which has not read anything yet."""

    def __init__(self, saved: tuple[int, ...], remembered: tuple[int, ...]) -> None:
        self.world = World()
        first = Job(self.world, CONFIG, "a").start()
        for step in sorted({*saved, *remembered}):
            snapshot(first, step, "explicit" if step in saved else "memory")
            beat(self.world, first.hosts)
        assert self.world.committed == list(saved)
        first.die()
        beat(self.world, first.hosts)
        self.job = Job(self.world, CONFIG, "b")
        for host, old in zip(self.job.hosts, first.hosts, strict=True):
            host.segments = dict(old.segments)
        beat(self.world, self.job.hosts)

    @property
    def chosen(self) -> tuple[int | None, bool]:
        """The step that both ranks are to read, and whether it is newer than the store."""
        steps = {(w.restore.step, w.restore.snapshot is not None) for w in self.job.workers if w.restore is not None}
        assert len(steps) == 1
        return steps.pop()

    def read(self, *damage: str | None) -> None:
        """How that went, by rank."""
        for worker, found in zip(self.job.workers, damage, strict=True):
            assert worker.restore is not None
            worker.restore_read(RestoreResult(*worker.restore.key, found))
        beat(self.world, self.job.hosts)


def test_an_older_snapshot_is_taken_where_the_newest_cannot_be_read() -> None:
    again = Restarted(saved=(5,), remembered=(10, 20))
    assert again.chosen == (20, True)
    again.read(None, "a byte is flipped")
    assert again.chosen == (10, True)
    record = again.world.log[-1]
    assert record.generation is not None
    assert (record.generation.snapshot, record.generation.round) == ((1, 10), 2)
    assert "taking step 10 from host memory" in record.reason
    again.read(None, None)
    assert all(w.restore_done and w.restored_step == 10 for w in again.job.workers)
    assert [c.superseded for c in record.live] == [False]


def test_one_that_is_older_than_the_newest_commit_is_not_taken() -> None:
    again = Restarted(saved=(15,), remembered=(10, 20))
    assert again.chosen == (20, True)
    again.read("a byte is flipped", None)
    assert again.chosen == (15, False)


def test_the_coordinator_may_die_between_two_choices() -> None:
    again = Restarted(saved=(), remembered=(10, 20))
    again.read(None, "a byte is flipped")
    again.world.restart_coordinator()
    beat(again.world, again.job.hosts)
    assert again.chosen == (10, True)
    again.read("gone", None)
    assert again.chosen == (None, False)


def test_between_a_damaged_checkpoint_and_the_one_before_lies_a_snapshot() -> None:
    again = Restarted(saved=(5, 20), remembered=(15,))
    assert again.chosen == (20, False)
    again.read("its shard is cut short", None)
    assert again.chosen == (15, True)
    again.read(None, None)
    assert [(c.step, c.superseded) for c in again.world.log[-1].live] == [(5, False), (20, True)]


def test_a_damaged_commit_is_not_given_up_for_memory_that_cannot_be_read_either() -> None:
    """Also if the coordinator that found it damaged is gone: to start afresh would have retention delete it."""
    for restarted in (False, True):
        again = Restarted(saved=(20,), remembered=(15,))
        assert again.chosen == (20, False)
        again.read("a byte is flipped", None)
        assert again.chosen == (15, True)
        if restarted:
            again.world.restart_coordinator()
            beat(again.world, again.job.hosts)
        again.read(None, "gone")
        assert [w.error and w.error.kind for w in again.job.workers] == ["DamagedError"] * 2
        assert [c.step for c in again.world.log[-1].live] == [20]
