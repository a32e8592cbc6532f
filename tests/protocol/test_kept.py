"""Until when snapshots stay in host memory for a restart."""

from __future__ import annotations

from tests.protocol.harness import Job, beat
from tests.protocol.loop import TWO, Loop


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
