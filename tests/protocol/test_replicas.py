"""Copies on other hosts: which are made, and which are written once a host is gone; precise schedules."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.protocol.host import StartWrite
from ray_ckpt.protocol.messages import JobConfig, Nodes, SegmentInfo
from tests.protocol.harness import Host, Job, World, beat, layout

COPIED = JobConfig(world_size=2, save_steps=1, replicas=1)
LOST = "a-host1"


def copy_of(host: Host) -> SegmentInfo:
    """The newest snapshot of a host's own rank, as its peer would hold it."""
    newest = max(host.segments.values(), key=lambda s: s.save)
    return replace(newest, replica=True, name=f"copy of {newest.name}", kept=False)


def under_way() -> tuple[World, Job, SegmentInfo]:
    """Step 1 lies on both hosts, and a copy of rank 1's on the first; nothing of it is written."""
    world = World()
    job = Job(world, COPIED, "a").start()
    for host in job.hosts:
        host.writes = False
    job.step(1)
    copy = copy_of(job.hosts[1])
    job.hosts[0].segments[copy.name] = copy
    job.hosts[0].logic.on_segments((), {copy.fingerprint: layout(copy.rank, 2)})
    beat(world, job.hosts)
    return world, job, copy


def orders(host: Host) -> tuple[int, ...]:
    """The ranks whose copies this host is told to write."""
    assert host.logic.view is not None
    return tuple(rank for order in host.logic.view.orders for rank in order.replicas)


def writes(host: Host) -> list[StartWrite]:
    """What a host whose agent has just been started again would begin to write."""
    host.logic._writing.clear()
    return [action for action in host.logic.take() if isinstance(action, StartWrite)]


def test_each_host_has_its_newest_snapshot_copied_by_the_other() -> None:
    _, job, _ = under_way()
    assert [[(m.segment.rank, m.peer) for m in host.mirrors] for host in job.hosts] == [
        [(0, LOST)],
        [(1, "a-host0")],
    ]


def test_a_copy_is_left_alone_while_its_host_lives() -> None:
    _, job, copy = under_way()
    assert orders(job.hosts[0]) == ()
    assert all(start.segment.name != copy.name for start in writes(job.hosts[0]))


def test_a_copy_is_written_once_its_host_is_gone_under_numbers_of_its_own() -> None:
    world, job, copy = under_way()
    here, lost = job.hosts
    originals = writes(lost)
    world.coordinator.on_nodes(Nodes(dead=frozenset({LOST})), world.now)
    world.exchange(here)
    assert orders(here) == (1,)
    started = [start for start in writes(here) if start.segment.name == copy.name]
    numbers = [{s.shard_id(t) for s in starts for t in range(s.order.max_tries)} for starts in (originals, started)]
    assert all(numbers)
    assert not numbers[0] & numbers[1]
    assert all(number < started[0].order.num_shards - 1 for number in numbers[1])
    here.writes = True
    here.logic._writing.clear()
    beat(world, [here])
    assert world.committed == [1]


def test_without_a_copy_the_save_fails_with_the_host() -> None:
    world, job, copy = under_way()
    del job.hosts[0].segments[copy.name]
    beat(world, job.hosts)
    world.coordinator.saves.active[1, 1].replicas.clear()
    world.coordinator.on_nodes(Nodes(dead=frozenset({LOST})), world.now)
    beat(world, job.hosts[:1])
    assert world.committed == []
    outcome = world.coordinator.saves.outcomes[1, 1]
    assert (outcome.state, "a-host1 is gone" in outcome.error) == ("failed", True)


def test_a_rank_is_taken_over_once() -> None:
    world, _, _ = under_way()
    both = Nodes(dead=frozenset({LOST, "a-host0"}))
    world.coordinator.on_nodes(Nodes(dead=frozenset({LOST})), world.now)
    assert world.coordinator.saves.active[1, 1].taken_over == {1: "a-host0"}
    world.coordinator.on_nodes(both, world.now)
    assert not world.coordinator.saves.active
    assert world.coordinator.saves.outcomes[1, 1].state == "failed"


def test_a_silent_host_is_taken_over_after_a_while() -> None:
    world, job, _ = under_way()
    here = job.hosts[0]
    while world.now < 2 * COPIED.host_timeout_s - 2.0:
        world.tick(1.0)
        beat(world, [here], 1)
    assert orders(here) == ()
    for _ in range(8):
        world.tick(1.0)
        beat(world, [here], 1)
    assert orders(here) == (1,)


def test_a_coordinator_that_never_heard_of_the_lost_host_has_its_copy_written() -> None:
    world, job, _ = under_way()
    here = job.hosts[0]
    world.restart_coordinator()
    beat(world, [here])
    assert orders(here) == ()
    world.tick(COPIED.host_timeout_s)
    here.writes = True
    here.logic._writing.clear()
    beat(world, [here])
    assert world.committed == [1]


def test_what_is_only_kept_is_not_written() -> None:
    """It may be overwritten at any time: a coordinator that was started again may ask for a save that has failed."""
    _, job, _ = under_way()
    host = job.hosts[0]
    name = next(name for name, s in host.segments.items() if not s.replica)
    assert {start.segment.name for start in writes(host)} == {name}
    host.logic.on_segments([replace(host.segments[name], kept=True)])
    assert writes(host) == []


def test_a_second_copy_of_the_same_snapshot_is_not_wanted() -> None:
    """It would count its tries from the same number as the first."""
    _, job, _ = under_way()
    here = job.hosts[0].logic
    original = next(iter(job.hosts[1].segments.values()))
    assert here.has_copy(original)
    assert not here.has_copy(replace(original, step=2))
    assert not here.has_copy(replace(original, trigger="memory"))
    assert not here.has_copy(replace(original, rank=0))
