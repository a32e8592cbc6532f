"""A host that is about to go: one save of all, then all stop; precise schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.protocol.messages import Leaving
from tests.protocol.harness import Job, beat
from tests.protocol.loop import TWO, Loop

DRAIN = "is being drained by Ray"
DRAINED = Leaving(DRAIN)
MATE = Leaving("lies in a slice that goes", drained=False)


def begun(loop: Loop) -> Loop:
    """Both ranks have made steps."""
    loop.until(lambda: all(step >= 3 for step in loop.steps), lambda _: 1)
    return loop


def told(loop: Loop) -> bool:
    """The coordinator hears that the second host goes."""
    host = loop.job.hosts[1].logic.host
    return loop.world.coordinator.on_leaving({host: DRAINED}, loop.world.now)


def test_all_save_one_step_and_stop_at_it() -> None:
    loop = begun(Loop(told=None))
    assert told(loop)
    assert not told(loop)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    first, second = loop.stops[0], loop.stops[1]
    assert first.step == second.step
    assert first.preempted
    assert first.reason == f"the host of rank 1, {loop.job.hosts[1].logic.name}, {DRAIN}"
    loop.until(lambda: loop.world.committed == [first.step], lambda _: 0)
    assert [w.stop_state(first) for w in loop.job.workers] == ["decided", "decided"]
    assert loop.world.coordinator.status().notes == (f"{loop.job.hosts[1].logic.name} {DRAIN}",)


def test_a_host_without_ranks_of_the_job_may_go() -> None:
    loop = begun(Loop(told=None))
    loop.world.coordinator.on_leaving({"another host": DRAINED}, loop.world.now)
    loop.until(lambda: loop.steps[0] > 20, lambda _: 1)
    assert not loop.stops
    assert loop.world.coordinator.status().notes == (f"another host {DRAIN}",)


def test_a_notice_before_the_start_stops_the_job_at_its_first_steps() -> None:
    loop = Loop(told=None)
    told(loop)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    assert loop.stops[0].step == loop.stops[1].step <= 5


def test_a_stop_that_was_asked_for_becomes_one_that_is_preempted() -> None:
    loop = begun(Loop(told=None))
    cut = loop.world.coordinator.cut
    cut.want_stop("enough")
    told(loop)
    assert cut.stop is not None
    assert cut.stop.preempted
    assert cut.stop.reason.startswith("enough; the host of rank 1")


def test_an_error_is_not_hidden_by_a_notice() -> None:
    loop = begun(Loop(told=None))
    loop.world.coordinator.cut.want_stop("saves fail", "disk full")
    told(loop)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    assert {(s.error, s.preempted) for s in loop.stops.values()} == {("disk full", False)}


def test_the_next_start_elsewhere_is_not_stopped() -> None:
    loop = begun(Loop(told=None))
    told(loop)
    loop.until(lambda: len(loop.stops) == 2 and bool(loop.world.committed), lambda _: 1)
    for worker in loop.job.workers:
        worker.finish()
    beat(loop.world, loop.job.hosts, 2)
    again = Job(loop.world, TWO, "b").start()
    assert again.workers[0].restored_step == loop.stops[0].step
    cut = loop.world.coordinator.cut
    assert cut.stop is None
    assert not any(p.kind == "stop" for p in cut.proposals.values())


def test_a_host_whose_slice_goes_stops_one_start_and_not_the_next() -> None:
    loop = begun(Loop(told=None))
    loop.world.coordinator.on_leaving({"a-host0": MATE, "b-host0": MATE}, loop.world.now)
    loop.until(lambda: len(loop.stops) == 2 and bool(loop.world.committed), lambda _: 1)
    for worker in loop.job.workers:
        worker.finish()
    beat(loop.world, loop.job.hosts, 2)
    loop.job = Job(loop.world, TWO, "b").start()
    last = loop.steps[0]
    loop.until(lambda: loop.steps[0] > last + 20, lambda _: 1)
    assert loop.world.coordinator.cut.stop is None
    loop.world.coordinator.on_leaving({"b-host0": MATE, "b-host1": DRAINED}, loop.world.now)
    loop.stops.clear()
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)


def test_a_host_of_such_a_slice_that_is_drained_itself_stops_the_start() -> None:
    loop = begun(Loop(told=None))
    coordinator = loop.world.coordinator
    coordinator._heeded = {("a-host1", False)}
    coordinator.on_leaving({"a-host1": MATE}, loop.world.now)
    loop.until(lambda: loop.steps[0] > 20, lambda _: 1)
    assert not loop.stops
    coordinator.on_leaving({"a-host1": DRAINED}, loop.world.now)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)


@pytest.mark.parametrize("wish", ["leaving", "worker", "driver"])
def test_a_loop_that_does_not_stop_is_saved_as_before(wish: str) -> None:
    loop = begun(Loop(replace(TWO, save_secs=5.0), told=None))
    if wish == "leaving":
        told(loop)
    elif wish == "worker":
        loop.job.workers[0].request_stop("enough", preempted=True)
    else:
        loop.world.coordinator.request_stop("enough", loop.world.now)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    stopped = {stop.id for stop in loop.stops.values()}
    committed = len(loop.world.committed)
    loop.until(lambda: len(loop.world.committed) > committed + 2, lambda _: 1)
    loop.serve("r", lambda _: 1)
    assert {stop.id for stop in loop.stops.values()} == stopped, "and is told once"
    loop.world.coordinator.on_leaving({"a-host0": DRAINED, "a-host1": DRAINED}, loop.world.now)
    loop.until(lambda: {stop.id for stop in loop.stops.values()} != stopped, lambda _: 1)


def test_reasons_of_a_worker_add_up() -> None:
    worker = begun(Loop(told=None)).job.workers[0]
    worker.request_stop("SIGTERM", preempted=True)
    worker.request_stop("enough")
    wish = worker.report().stop_request
    assert wish is not None
    assert (wish.reason, wish.preempted) == ("SIGTERM; enough", True)


@pytest.mark.parametrize("preempted", [True, False])
def test_a_worker_that_is_to_be_ended_asks_for_the_same(preempted: bool) -> None:
    loop = begun(Loop(told=None))
    loop.job.workers[0].request_stop("SIGTERM", preempted=preempted)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    assert {(s.reason, s.preempted) for s in loop.stops.values()} == {("SIGTERM", preempted)}


def test_with_too_little_time_what_was_committed_stays() -> None:
    loop = begun(Loop(told=None))
    loop.serve("before", lambda _: 1)
    kept = loop.world.committed
    loop.job.hosts[1].writes = False
    told(loop)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    loop.job.hosts[1].logic.on_worker_dead(loop.job.workers[1].worker)
    beat(loop.world, loop.job.hosts, 3)
    assert loop.world.committed == kept
