"""A directory that was deleted and made anew: what lies in memory of the one before is nobody's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.protocol.messages import Trigger
from tests.protocol.harness import Job, World, beat
from tests.protocol.loop import TWO

CONFIG = replace(TWO, memory_steps=10)


def snapshot(job: Job, step: int, trigger: Trigger) -> None:
    """Each rank's snapshot of this step lies in memory."""
    for host, worker in zip(job.hosts, job.workers, strict=True):
        worker.arrive(step)
        host.seal(worker, step, trigger)
        if trigger == "memory":
            del worker.snapshots[step]


def again(world: World, before: Job, name: str) -> Job:
    """The next start, on the machines of the one before, whose snapshots are still there."""
    job = Job(world, CONFIG, name)
    for host, old in zip(job.hosts, before.hosts, strict=True):
        host.segments = dict(old.segments)
    return job.start()


def deleted(world: World, job: Job) -> None:
    job.die()
    beat(world, job.hosts)
    world.log.clear()
    world.claims.clear()
    world.restart_coordinator()


@pytest.mark.parametrize("trigger", ["memory", "explicit"])
def test_nothing_of_it_is_restored_committed_or_kept(trigger: Trigger) -> None:
    world = World()
    first = Job(world, CONFIG, "a").start()
    for host in first.hosts:
        host.writes = False
    snapshot(first, 5000, trigger)
    deleted(world, first)
    second = again(world, first, "b")
    assert second.workers[0].restored_step is None
    beat(world, second.hosts)
    assert world.committed == []
    assert not any(host.segments for host in second.hosts)


def test_its_snapshots_do_not_take_the_place_of_newer_ones() -> None:
    world = World()
    first = Job(world, CONFIG, "a").start()
    snapshot(first, 5000, "memory")
    deleted(world, first)
    second = again(world, first, "b")
    snapshot(second, 10, "memory")
    beat(world, second.hosts)
    second.die()
    beat(world, second.hosts)
    assert again(world, second, "c").workers[0].restored_step == 10


def test_parts_of_both_make_no_whole() -> None:
    world = World()
    first = Job(world, CONFIG, "a").start()
    snapshot(first, 50, "memory")
    deleted(world, first)
    second = Job(world, CONFIG, "b").start()
    host, worker = second.hosts[0], second.workers[0]
    worker.arrive(50)
    host.seal(worker, 50, "memory")
    second.hosts[1].segments = dict(first.hosts[1].segments)
    world.exchange(host)
    world.exchange(second.hosts[1])
    assert world.coordinator.recall.newest is None
