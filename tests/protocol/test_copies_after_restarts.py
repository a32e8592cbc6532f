"""Copies of snapshots (`replicas=1`) once the job was started again: nothing that is of no use holds memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_ckpt.protocol.messages import JobConfig, Nodes, RestoreResult
from tests.protocol.harness import Host, Job, World, beat, layout
from tests.protocol.test_deleted import snapshot


def copy_all(world: World, hosts: Sequence[Host], by_name: Mapping[str, Host]) -> list[tuple[int, str]]:
    """Carry out what copies are asked for; (rank, peer) of each."""
    made = []
    for _ in range(4):
        beat(world, hosts, 3)
        for host in hosts:
            for asked in host.mirrors:
                copy = replace(asked.segment, replica=True, name=f"copy-{asked.segment.name}", kept=True)
                by_name[asked.peer].segments[copy.name] = copy
                host.logic.on_mirrored(asked.segment, whole=True)
                made.append((asked.segment.rank, asked.peer))
            host.mirrors.clear()
    beat(world, hosts, 3)
    return made


def names(hosts: Sequence[Host]) -> dict[str, Host]:
    return {host.logic.host: host for host in hosts}


def restore(world: World, job: Job, hosts: Sequence[Host]) -> list[tuple[int, int] | None]:
    """What all ranks read."""
    beat(world, hosts)
    chosen = []
    for worker in job.workers:
        assert worker.restore is not None
        chosen.append(worker.restore.snapshot)
        worker.restore_read(RestoreResult(*worker.restore.key))
    beat(world, hosts)
    for worker in job.workers:
        worker.set_layout(layout(worker.rank, len(job.workers)))
    return chosen


def test_what_a_start_left_behind_does_not_hold_the_memory_of_the_next() -> None:
    world = World()
    first = Job(world, JobConfig(world_size=2, memory_steps=10, replicas=1), "a").start()
    for step in (10, 20):
        snapshot(first, step, "memory")
        copy_all(world, first.hosts, names(first.hosts))
    first.workers[0].arrive(30)
    first.hosts[0].seal(first.workers[0], 30, "memory")
    copy_all(world, first.hosts, names(first.hosts))
    first.die()
    beat(world, first.hosts)
    second = Job(world, JobConfig(world_size=2, memory_steps=10, replicas=1), "b")
    for host, fresh in zip(first.hosts, second.hosts, strict=True):
        host.workers = fresh.workers
    assert restore(world, second, first.hosts) == [(1, 20)] * 2
    copy_all(world, first.hosts, names(first.hosts))
    assert (1, 30) in second.workers[0].loose
    assert (1, 20) not in second.workers[0].loose


def test_a_new_peer_copies_what_the_lost_one_had() -> None:
    config = JobConfig(world_size=3, memory_steps=10, replicas=1)
    world = World()
    first = Job(world, config, "a").start()
    snapshot(first, 10, "memory")
    copy_all(world, first.hosts, names(first.hosts))
    view = first.hosts[1].logic.view
    assert view is not None
    lost = view.peer
    for host, worker in zip(first.hosts, first.workers, strict=True):
        if host.logic.host != lost:
            host.logic.on_worker_dead(worker.worker)
            host.workers.remove(worker)
    left = [host for host in first.hosts if host.logic.host != lost]
    world.coordinator.on_nodes(Nodes(dead=frozenset({lost})), world.now)
    beat(world, left)
    second = Job(world, config, "b")
    hosts = []
    for host, fresh, worker in zip(first.hosts, second.hosts, second.workers, strict=True):
        if host in left:
            host.workers = [worker]
        hosts.append(host if host in left else fresh)
    assert restore(world, second, hosts) == [(1, 10)] * 3
    made = copy_all(world, hosts, names([*first.hosts, *hosts]))
    assert [rank for rank, _ in made] == [1]
    assert made[0][1] != lost
