"""What retention deletes, keeps for good and leaves alone, through the log: precise schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.protocol.messages import JobConfig, RestoreWish
from tests.protocol.harness import Job, World, beat

ONE = JobConfig(world_size=1, save_steps=1, max_to_keep=1, delete_grace_s=0.0)


def _run(world: World, config: JobConfig, name: str, first: int, last: int, gap_s: float = 0.0) -> None:
    """A start that goes on from the newest, saves each step, and is killed."""
    job = Job(world, config, name).start()
    for step in range(first, last + 1):
        job.step(step)
        beat(world, job.hosts)
        world.tick(gap_s)
    beat(world, job.hosts)
    job.die()
    beat(world, job.hosts)


def test_what_is_old_enough_is_marked_in_the_log_and_stays() -> None:
    world = World()
    _run(world, replace(ONE, keep_every_hours=1.0), "a", 1, 6, gap_s=1500.0)
    found = [(c.step, c.preserved) for c in world.log[-1].live]
    assert found == [(1, True), (4, True), (6, False)]
    assert world.deleted == ["model.ckpt-2", "model.ckpt-3", "model.ckpt-5"]


def test_the_mark_outlives_the_start_and_counts_for_the_next() -> None:
    world = World()
    config = replace(ONE, keep_every_hours=1.0)
    _run(world, config, "a", 1, 2, gap_s=600.0)
    _run(world, config, "b", 3, 4, gap_s=600.0)
    assert [(c.step, c.preserved) for c in world.log[-1].live] == [(1, True), (4, False)]


def test_the_grid_goes_on_from_the_marks_in_the_log() -> None:
    world = World()
    config = replace(ONE, keep_every_hours=1.0, keep_hours_grid=0.0)
    world.tick(2380.0)
    _run(world, config, "a", 1, 5, gap_s=2380.0)
    _run(world, config, "b", 6, 9, gap_s=2380.0)
    assert [c.step for c in world.log[-1].live if c.preserved] == [2, 4, 5, 7, 8]


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_may_differ_in_what_is_theirs_and_the_first_ones_counts(first: int) -> None:
    """Whoever comes first."""
    world = World()
    _run(world, replace(ONE, max_to_keep=3), "a", 1, 3)
    config = JobConfig(world_size=2, save_steps=1, max_to_keep=1, delete_grace_s=0.0, keep_before=2)
    job = Job(world, config, "b")
    job.workers[1].config = replace(config, keep_before=None, keep_hours_from=1e9, keep_hours_grid=1e9)
    job.hosts[first].beat()
    job.start()
    assert [w.refused for w in job.workers] == [None, None]
    for step in (4, 5):
        job.step(step)
        beat(world, job.hosts)
    assert world.committed == [1, 2, 3, 5]


def test_what_earlier_starts_made_is_left_alone_if_asked_for() -> None:
    world = World()
    _run(world, replace(ONE, max_to_keep=3), "a", 1, 3)
    _run(world, replace(ONE, keep_before=0), "b", 4, 6)
    assert world.committed == [1, 2, 3, 6]
    _run(world, replace(ONE, keep_before=2), "c", 7, 8)
    assert world.committed == [1, 2, 3, 8]
    assert world.deleted == ["model.ckpt-4", "model.ckpt-5", "model.ckpt-6", "model.ckpt-7"]


def test_a_run_that_starts_afresh_may_leave_what_is_there() -> None:
    world = World()
    _run(world, replace(ONE, max_to_keep=3), "a", 1, 3)
    job = Job(world, replace(ONE, keep_before=0, fresh=True), "b", RestoreWish("none")).start()
    for step in (1, 2):
        job.step(step)
        beat(world, job.hosts)
    live = [(c.step, c.superseded) for c in world.log[-1].live]
    assert live == [(1, True), (2, True), (3, True), (2, False)]


def test_prefixes_begin_as_the_job_says() -> None:
    world = World()
    _run(world, replace(ONE, max_to_keep=None, basename="my model"), "a", 1, 1)
    assert [c.prefix for c in world.log[-1].live] == ["my model-1"]
    job = Job(world, replace(ONE, fresh=True, basename="my model"), "b", RestoreWish("none")).start()
    job.step(1)
    beat(world, job.hosts)
    newest = world.log[-1].live[-1]
    assert newest.prefix == f"{newest.attempt}/my model-1"
