"""Until when snapshots stay in host memory for a restart."""

from __future__ import annotations

from dataclasses import replace

from ray_ckpt.protocol.host import HostLogic, Keep, StartWrite
from ray_ckpt.protocol.messages import HostView, WriteOrder
from tests.protocol.harness import Job, beat, shard
from tests.protocol.loop import TWO, Loop
from tests.protocol.test_recall import part


def restarted() -> tuple[Loop, list[Job]]:
    """A job that was killed after a save, and started anew on other hosts."""
    loop = Loop()
    loop.serve("before", lambda _: 1)
    first = loop.job
    first.die()
    beat(loop.world, first.hosts)
    loop.world.tick(TWO.host_timeout_s)
    loop.job = Job(loop.world, TWO, "b").start()
    loop.steps = [loop.job.workers[0].restored_step or 0] * 2
    loop.serve("after", lambda _: 1)
    return loop, [first, loop.job]


def test_after_a_clean_end_no_host_keeps_anything_whatever_ran_there_before() -> None:
    loop, jobs = restarted()
    hosts = [host for job in jobs for host in job.hosts]
    beat(loop.world, hosts)
    assert all(host.segments for host in loop.job.hosts)
    for worker in loop.job.workers:
        worker.finish(closed=True)
    beat(loop.world, hosts)
    assert not any(host.segments for host in hosts)
    assert not any(host.logic.recoverable for host in hosts)


def test_while_a_rank_has_not_closed_the_newest_stays() -> None:
    loop, jobs = restarted()
    hosts = [host for job in jobs for host in job.hosts]
    loop.job.workers[0].finish(closed=True)
    loop.job.workers[1].finish()
    beat(loop.world, hosts)
    assert all(host.segments for host in loop.job.hosts)


def test_a_later_coordinator_hears_at_once_that_a_decided_save_is_not_written_again() -> None:
    """Its snapshot may be overwritten by then, and the commits of later steps would wait for it."""
    logic = HostLogic("a", "1")
    snapshot = part(0, 3, 20)
    order = WriteOrder("e000002-000001", 3, 20, "plan", "model.ckpt-20", 2, 3)
    logic.on_view(HostView(1, 1, orders=(replace(order, attempt="e000001-000001"),), directory=""))
    logic.on_segments([snapshot])
    (start,) = logic.take()
    assert isinstance(start, StartWrite)
    logic.on_view(HostView(1, 2, decided=((3, 20),), directory=""))
    logic.on_view(HostView(2, 1, orders=(order,), directory=""))
    assert logic.take() == [], "as long as the first writer is at work"
    logic.on_written(start, shard(start.order.attempt, start.writer))
    assert logic.take() == [Keep(snapshot)]
    assert [(failure.attempt, failure.writer) for failure in logic.report().failures] == [("e000002-000001", 0)]
