"""Loops that tell the coordinator a bound instead of each step: precise schedules."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.protocol.messages import JobConfig
from tests.protocol.harness import Job, World, beat

TWO = JobConfig(world_size=2)


def _started() -> tuple[World, Job]:
    world = World()
    return world, Job(world, TWO, "a").start()


def test_a_request_is_served_beyond_every_bound_at_one_real_step() -> None:
    world, job = _started()
    for worker, bound in zip(job.workers, (7, 9), strict=True):
        assert not worker.reached(bound)
    job.workers[0].request("r", "wanted")
    beat(world, job.hosts)
    assert [w.reached(9) for w in job.workers] == [True, True]
    for step in range(8, 14):
        job.step(step)
        beat(world, job.hosts)
    assert len(world.committed) == 1
    assert world.committed[0] > 9
    assert [w.reached(13) for w in job.workers] == [False, False]


def test_a_bound_beyond_the_step_of_a_save_does_not_make_it_hopeless() -> None:
    world, job = _started()
    first, second = job.workers
    second.reached(6)
    due = first.arrive(5, ask="explicit")
    assert due is not None
    job.hosts[0].seal(first, 5)
    beat(world, job.hosts)
    assert first.outcomes == {}
    second.arrive(5, ask="explicit")
    job.hosts[1].seal(second, 5)
    beat(world, job.hosts)
    assert world.committed == [5]


def test_a_loop_of_several_steps_a_run_is_met_at_one_that_it_comes_to() -> None:
    world, job = _started()
    for worker in job.workers:
        worker.reached(300, 100)
    job.workers[0].request("r", "wanted")
    beat(world, job.hosts)
    steps = {p.step for w in job.workers for p in w.report().accepted}
    assert steps == {400}


def test_the_gaps_between_the_steps_that_are_told_are_no_stride() -> None:
    world, job = _started()
    for worker in job.workers:
        worker.reached(0)
    for step in (2, 1000):
        job.step(step)
    for worker in job.workers:
        worker.reached(1001)
    job.workers[0].request("r", "wanted")
    beat(world, job.hosts)
    steps = {p.step for w in job.workers for p in w.report().accepted}
    assert steps == {1002}


def test_a_bound_that_no_step_falls_on_does_not_move_the_stride() -> None:
    world = World()
    job = Job(world, replace(TWO, stride=2), "a").start()
    for step in (2, 4):
        job.step(step)
    for worker in job.workers:
        worker.reached(7)
    job.workers[0].request("r", "wanted")
    beat(world, job.hosts)
    steps = {p.step for w in job.workers for p in w.report().accepted}
    assert len(steps) == 1
    (step,) = steps
    assert step > 7
    assert step % 2 == 0


def test_a_stop_is_agreed_on_beyond_every_bound() -> None:
    world, job = _started()
    for worker in job.workers:
        worker.reached(4)
    job.workers[1].request_stop("enough")
    beat(world, job.hosts)
    steps = [next(p.step for p in w.report().accepted) for w in job.workers]
    assert steps[0] == steps[1] > 4
    job.step(steps[0])
    beat(world, job.hosts)
    assert world.committed == [steps[0]]
