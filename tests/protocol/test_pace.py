"""How seldom the processes speak, and what does not wait for that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.protocol.messages import HostView, JobConfig
from ray_ckpt.protocol.pace import IDLE_S, WATCHED_S, is_news, poll_s, spread_s
from ray_ckpt.protocol.views import adds_to
from tests.protocol.harness import Job, World, beat

TWO = JobConfig(world_size=2, save_steps=5)
MANY = JobConfig(world_size=8, save_steps=5)


def started(config: JobConfig) -> tuple[World, Job]:
    """A job that trains, and of which every view has been taken."""
    world = World()
    job = Job(world, config, "a").start()
    beat(world, job.hosts)
    world.coordinator.views.take_changed()
    return world, job


def report(job: Job, rank: int, step: int) -> None:
    """The rank's loop goes on to a step, and its host tells the coordinator as an agent does: no derivation follows."""
    host, worker = job.hosts[rank], job.workers[rank]
    worker.arrive(step)
    host.logic.on_worker(worker.report())


@pytest.mark.parametrize("hosts", [1, 64, 1250, 1251, 4096, 10_000, 100_000])
def test_all_hosts_together_ask_no_more_often_than_the_coordinator_can_answer(hosts: int) -> None:
    interval = poll_s(hosts, 30.0, watched=True)
    assert hosts / interval <= 1250 or interval == WATCHED_S
    assert interval >= spread_s(hosts)


def test_few_hosts_ask_seldom_unless_they_are_watched_or_must_be_heard_of_soon() -> None:
    assert poll_s(2, 30.0, watched=False) == IDLE_S
    assert poll_s(2, 30.0, watched=True) == WATCHED_S
    assert poll_s(2, 2.0, watched=False) == 0.5


def test_the_interval_reaches_hosts_and_workers() -> None:
    _, job = started(TWO)
    view = job.hosts[0].logic.view
    assert view is not None
    assert view.poll_s == IDLE_S
    answer = job.hosts[0].logic.worker_view(job.workers[0].worker)
    assert answer is not None
    assert answer[2].poll_s == IDLE_S


def test_progress_is_no_news_to_anybody() -> None:
    world, job = started(MANY)
    before = world.coordinator.derivations
    for rank, host in enumerate(job.hosts):
        report(job, rank, 3)
        assert not host.logic.news
        assert not world.coordinator.take_in(host.logic.report(), world.now)
    assert world.coordinator.derivations == before
    assert not world.coordinator.views.take_changed()
    assert world.coordinator.status().steps == (3,) * 8


def test_many_reports_are_taken_in_by_one_derivation() -> None:
    world, job = started(MANY)
    job.step(5)
    before = world.coordinator.derivations
    for host, worker in zip(job.hosts, job.workers, strict=True):
        host.logic.on_worker(worker.report())
        host.logic.on_segments(host.segments.values())
        assert host.logic.news
        assert world.coordinator.take_in(host.logic.report(), world.now)
    world.coordinator.derive(world.now)
    assert world.coordinator.derivations == before + 1
    (save,) = world.coordinator.saves.active.values()
    assert save.sealed


def test_a_host_is_not_looked_at_for_what_another_one_says() -> None:
    world, job = started(MANY)
    job.step(5)
    beat(world, job.hosts[:1], rounds=1)
    world.coordinator.views.take_changed()
    host = job.hosts[1]
    host.logic.on_worker(job.workers[1].report())
    host.logic.on_segments(host.segments.values())
    world.coordinator.on_report(host.logic.report(), world.now)
    assert set(world.coordinator.views.take_changed()) == {host.logic.host}


def test_an_order_tells_a_host_of_its_own_shards_only() -> None:
    world, job = started(MANY)
    for host in job.hosts[1:]:
        host.writes = False
    job.step(5)
    beat(world, job.hosts, rounds=2)
    own, other = (world.coordinator.view(host.logic.host) for host in job.hosts[:2])
    assert own is not None
    assert other is not None
    assert [order.done for order in own.orders] == [(0,)]
    assert [order.done for order in other.orders] == [()]


def test_whom_all_wait_for_is_told_with_the_next_answer_only() -> None:
    world, job = started(TWO)
    view = world.coordinator.view(job.hosts[0].logic.host)
    assert view is not None
    waiting = replace(view, workers=(replace(view.workers[0], late="rank 1"),))
    assert waiting != view
    assert not adds_to(waiting, view)


def test_the_steps_are_watched_before_a_save_by_time() -> None:
    world, job = started(JobConfig(world_size=2, save_secs=60.0))
    job.step(1)
    beat(world, job.hosts)

    def view() -> HostView:
        found = world.coordinator.view(job.hosts[0].logic.host)
        assert found is not None
        return found

    assert not view().watched
    world.tick(57.0)
    assert view().watched
    assert view().poll_s == WATCHED_S
    beat(world, job.hosts, rounds=1)
    report(job, 0, 2)
    assert job.hosts[0].logic.news


def test_a_proposal_waits_for_a_fresh_step_but_not_for_long() -> None:
    world, job = started(JobConfig(world_size=2))
    job.step(1)
    beat(world, job.hosts)
    world.tick(10.0)
    world.coordinator.request_save("r", "asked", world.now)
    assert not world.coordinator.cut.proposals
    report(job, 0, 2)
    world.coordinator.on_report(job.hosts[0].logic.report(), world.now)
    assert [p.step for p in world.coordinator.cut.proposals.values()] == [3]


def test_a_proposal_is_made_although_nobody_tells_a_fresh_step() -> None:
    world, job = started(JobConfig(world_size=2))
    job.step(1)
    beat(world, job.hosts)
    world.tick(10.0)
    world.coordinator.request_save("r", "asked", world.now)
    world.tick(WATCHED_S)
    assert [p.step for p in world.coordinator.cut.proposals.values()] == [2]


def test_a_rank_whose_snapshot_is_late_is_watched() -> None:
    world, job = started(TWO)
    job.workers[0].arrive(5)
    job.hosts[0].seal(job.workers[0], 5)
    beat(world, job.hosts, rounds=2)
    world.tick(2 * WATCHED_S)
    views = [world.coordinator.view(host.logic.host) for host in job.hosts]
    assert [view.watched for view in views if view] == [False, True]


def test_the_roll_is_called_once_all_have_joined() -> None:
    world = World()
    job = Job(world, MANY, "a")
    for host in job.hosts[:-1]:
        host.beat()
    for host in job.hosts[:-1]:
        host.beat()
    assert {w.report().roll_call for w in job.workers[:-1]} == {-1}
    beat(world, job.hosts)
    assert all(w.generation is not None for w in job.workers)


def test_what_is_said_no_more_wakes_nobody() -> None:
    world, job = started(TWO)
    job.step(5)
    for host in job.hosts:
        host.writes = False
    beat(world, job.hosts, rounds=2)
    view = world.coordinator.view(job.hosts[0].logic.host)
    assert view is not None
    assert view.orders
    fewer = replace(view, orders=())
    assert not adds_to(fewer, view)
    assert adds_to(view, fewer)
    decided = replace(view, decided=((1, 5),))
    assert adds_to(decided, view)
    assert not adds_to(view, decided)


def test_to_have_heard_of_an_outcome_is_no_news() -> None:
    _, job = started(TWO)
    known = replace(job.workers[0].report(), pending=(5, 10))
    assert not is_news(replace(known, pending=(10,)), known, steps=False)
    assert is_news(replace(known, pending=(5, 10, 15)), known, steps=False)
