"""Starts of a job beside another one, and what holds nobody up for ever: precise schedules."""

from __future__ import annotations

import pytest

from ray_ckpt.protocol.flows import Append, Io, PutIndex
from ray_ckpt.protocol.messages import JobConfig, RestoreWish
from tests.protocol.harness import Job, World, beat

TWO = JobConfig(world_size=2, save_steps=1)


@pytest.mark.parametrize("wish", [RestoreWish("none"), RestoreWish("step", 999)])
def test_a_start_that_fails_lets_the_running_job_go_on(wish: RestoreWish) -> None:
    world = World()
    job = Job(world, TWO, "a").start()
    job.step(1)
    beat(world, job.hosts)
    stray = Job(world, JobConfig(world_size=1, save_steps=7), "stray", wish)
    beat(world, [*job.hosts, *stray.hosts])
    assert stray.workers[0].error is not None
    job.step(2)
    beat(world, [*job.hosts, *stray.hosts])
    stray.die()
    job.step(3)
    beat(world, [*job.hosts, *stray.hosts])
    assert world.committed == [1, 2, 3]
    assert [w.refused for w in job.workers] == [None, None]


def with_step_1_unwritten() -> tuple[World, Job]:
    """A job that has snapshotted step 1, of which no shard is written until `let_write`."""
    world = World()
    job = Job(world, TWO, "a").start()
    for host in job.hosts:
        host.writes = False
    job.step(1)
    beat(world, job.hosts)
    return world, job


def let_write(job: Job) -> None:
    for host in job.hosts:
        host.writes = True
        host.logic._writing.clear()


def test_a_coordinator_that_finds_only_dead_workers_has_what_they_left_written() -> None:
    world, job = with_step_1_unwritten()
    job.die()
    world.restart_coordinator()
    let_write(job)
    beat(world, job.hosts)
    assert world.committed == [1]
    assert all(host.logic.idle for host in job.hosts)


def test_no_save_is_begun_while_the_record_of_the_next_start_is_on_its_way() -> None:
    """Those whom it is for may have died by then."""
    world = World()
    job = Job(world, TWO, "a").start()
    world.hung = lambda io: isinstance(io, Append)
    second = Job(world, TWO, "b")
    beat(world, [*job.hosts, *second.hosts])
    second.die()
    beat(world, [*job.hosts, *second.hosts])
    job.step(1)
    beat(world, [*job.hosts, *second.hosts])
    assert world.coordinator.generations.forming is None
    assert not world.coordinator.saves.active


def test_a_start_that_is_killed_while_saves_settle_lets_the_running_job_go_on() -> None:
    world, job = with_step_1_unwritten()
    second = Job(world, TWO, "b")
    beat(world, [*job.hosts, *second.hosts])
    second.die()
    beat(world, [*job.hosts, *second.hosts])
    job.step(2)
    let_write(job)
    beat(world, [*job.hosts, *second.hosts])
    assert world.committed == [1, 2]


def test_a_process_that_has_left_is_no_part_of_any_start_after_a_restart_of_the_coordinator() -> None:
    world = World()
    job = Job(world, TWO, "a").start()
    stray = Job(world, JobConfig(world_size=1), "stray", RestoreWish("step", 3))
    beat(world, [*job.hosts, *stray.hosts])
    stray.workers[0].finish()
    stray.hosts[0].beat()
    for step in (1, 2, 3):
        job.step(step)
        beat(world, [*job.hosts, *stray.hosts])
    world.restart_coordinator()
    beat(world, [*job.hosts, *stray.hosts])
    job.step(4)
    beat(world, [*job.hosts, *stray.hosts])
    assert world.committed[-1] == 4
    generation = world.log[-1].generation
    assert generation is not None
    assert generation.number == 1


def test_an_answer_to_an_earlier_coordinators_roll_call_counts_for_nothing() -> None:
    world = World()
    first = Job(world, TWO, "a")
    first.hosts[0].beat()
    answered = first.workers[0].report().roll_call
    world.restart_coordinator()
    first.hosts[0].beat()
    forming = world.coordinator.generations.forming
    assert forming is not None
    assert forming.roll_call != answered


def test_a_rank_that_leaves_in_its_restore_ends_the_start_for_all() -> None:
    world = World()
    job = Job(world, TWO, "a")
    beat(world, job.hosts)
    job.workers[1].finish()
    beat(world, job.hosts)
    assert job.workers[0].error is not None
    assert "rank 1 on a-host1 has left without restoring" in job.workers[0].error.text


def test_a_host_that_owes_a_snapshot_and_is_silent_does_not_hold_the_save_to_its_deadline() -> None:
    world = World()
    job = Job(world, TWO, "a").start()
    job.workers[0].arrive(1)
    job.hosts[0].seal(job.workers[0], 1)
    for _ in range(30):
        job.hosts[0].beat()
        world.tick(3.0)
    assert job.workers[0].outcomes[1].state == "failed"
    assert "a-host1 was not heard of" in job.workers[0].outcomes[1].error


def test_a_save_whose_storage_hangs_does_not_hold_up_those_after_it() -> None:
    world = World()
    config = JobConfig(world_size=2, save_steps=1, save_timeout_s=30.0)
    job = Job(world, config, "a").start()

    def hang(io: Io) -> bool:
        return isinstance(io, PutIndex) and io.save.step == 1

    world.hung = hang
    job.step(1)
    beat(world, job.hosts)
    world.tick(31.0)
    job.step(2)
    beat(world, job.hosts)
    assert world.committed == [2]


def test_a_save_under_way_is_not_swept_while_the_clock_stands() -> None:
    world = World()
    config = JobConfig(world_size=2, save_steps=1, delete_grace_s=0.0)
    job = Job(world, config, "a").start()
    job.hosts[1].writes = False
    job.step(1)
    for host in job.hosts:
        host.beat()
    keeper = world.coordinator.keeper
    (claim,) = world.claims.values()
    assert not keeper._is_orphan(claim, world.coordinator.ledger.now)


@pytest.mark.parametrize("death", ["killed", "left"])
def test_those_that_still_step_stop_together_when_a_rank_is_gone(death: str) -> None:
    world = World()
    job = Job(world, JobConfig(world_size=3, save_steps=1, max_failures=2), "a").start()
    gone = job.workers[2]
    job.hosts[2].workers.remove(gone)
    if death == "killed":
        job.hosts[2].logic.on_worker_dead(gone.worker)
    else:
        gone.finish()
        job.hosts[2].logic.on_worker(gone.report())
    stops: dict[int, set[int]] = {0: set(), 1: set()}
    for step in range(1, 8):
        for rank in (0, 1):
            due = job.workers[rank].arrive(step)
            if due is not None and due.snapshot is not None:
                job.hosts[rank].seal(job.workers[rank], step)
            if due is not None and due.stop is not None:
                stops[rank].add(step)
                assert due.stop.error is not None
                assert "rank 2" in due.stop.error
        beat(world, job.hosts, 3)
        if stops[0]:
            break
    assert stops[0] == stops[1] != set()


def test_a_directory_that_was_emptied_is_chosen_from_by_a_coordinator_that_has_looked() -> None:
    world = World()
    job = Job(world, TWO, "a").start()
    job.step(1)
    beat(world, job.hosts)
    for worker in job.workers:
        worker.finish()
    beat(world, job.hosts)
    world.log.clear()
    second = Job(world, TWO, "b")
    beat(world, second.hosts)
    assert world.coordinator.ledger.phase == "fenced"
    assert world.log == []


def test_ranks_whose_partners_have_other_settings_do_not_wait_for_ever() -> None:
    world = World()
    job = Job(world, TWO, "a")
    other = Job(world, JobConfig(world_size=2, save_steps=7), "b")
    job.hosts[0].beat()
    other.hosts[1].beat()
    for _ in range(20):
        job.hosts[0].beat()
        other.hosts[1].beat()
        world.tick(2.0)
    assert job.workers[0].refused is not None
    assert "save_steps=1 against 7" in job.workers[0].refused
    assert other.workers[1].error is not None
    assert "save_steps=1 against 7" in other.workers[1].error.text


def test_hosts_that_are_gone_are_not_counted_for_ever() -> None:
    world = World()
    first = Job(world, TWO, "a").start()
    first.die()
    beat(world, first.hosts)
    second = Job(world, TWO, "b").start()
    for _ in range(70):
        world.tick(5.0)
        beat(world, second.hosts, 1)
    assert set(world.coordinator.roster.hosts) == {"b-host0", "b-host1"}
    assert set(world.coordinator.take_forgotten()) == {"a-host0", "a-host1"}


def test_a_silent_host_of_the_present_start_is_not_forgotten() -> None:
    world = World()
    job = Job(world, TWO, "a").start()
    for _ in range(140):
        world.tick(5.0)
        beat(world, job.hosts[:1], 1)
    assert set(world.coordinator.roster.hosts) == {"a-host0", "a-host1"}
