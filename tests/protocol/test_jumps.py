"""Agreed steps that a loop does not come to, or that one rank was too late for: precise schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.protocol.messages import Proposal, WorkerView
from ray_ckpt.protocol.worker import WorkerLogic
from tests.protocol.harness import beat
from tests.protocol.loop import TWO, Loop


@pytest.mark.parametrize("told", [1, None])
@pytest.mark.parametrize("length", [1, 7, 10, 100])
def test_requests_in_a_row_are_all_served_whatever_stride_is_told(length: int, told: int | None) -> None:
    loop = Loop(told=told)
    for request in "abcd":
        loop.serve(request, lambda _: length)
    assert len(loop.world.committed) == 4
    assert all(step % length == 0 for step in loop.world.committed)
    assert loop.world.coordinator.failures_in_a_row == 0


def test_requests_in_a_row_are_all_served_while_the_runs_change_their_length() -> None:
    loop = Loop()
    for request, length in zip("abcd", (10, 7, 100, 3), strict=True):
        loop.serve(request, lambda _, length=length: length)  # type: ignore[misc]
    assert len(loop.world.committed) == 4


def test_a_newly_told_stride_counts_until_it_proves_wrong_too() -> None:
    loop = Loop()
    loop.serve("a", lambda _: 100)
    strides = [w.report().stride for w in loop.job.workers]
    loop.told = 10
    loop.until(lambda: loop.steps[0] % 100 == 20, lambda _: 10)
    assert strides == [100, 100]
    assert [w.report().stride for w in loop.job.workers] == [10, 10]


def test_runs_that_take_turns_in_their_length_are_met_as_well() -> None:
    loop = Loop(told=50)
    for request in "abc":
        loop.serve(request, lambda run: (100, 50)[run % 2])


def test_a_save_by_time_that_was_jumped_over_is_still_due() -> None:
    loop = Loop(replace(TWO, save_secs=60.0))
    loop.until(lambda: all(step > 0 for step in loop.steps), lambda _: 7)
    loop.world.tick(61.0)
    loop.until(lambda: bool(loop.world.committed), lambda _: 7)
    assert loop.world.now < 100.0


@pytest.mark.parametrize("error", [None, "disk full"])
def test_a_stop_that_was_jumped_over_stops_the_job_later(error: str | None) -> None:
    loop = Loop()
    loop.until(lambda: all(step >= 20 for step in loop.steps), lambda _: 10)
    loop.world.coordinator.cut.want_stop("enough", error)
    beat(loop.world, loop.job.hosts)
    missed = [next(p for p in w.report().accepted) for w in loop.job.workers]
    assert {(p.step % 10 != 0, p.state) for p in missed} == {(True, "decided")}
    loop.until(lambda: len(loop.stops) == 2, lambda _: 10)
    assert loop.stops[0].step == loop.stops[1].step
    assert loop.stops[0].error == error
    assert [w.stop_state(p) for w, p in zip(loop.job.workers, missed, strict=True)] == ["dropped", "dropped"]
    assert [w.stop_state(loop.stops[0]) for w in loop.job.workers] == ["decided", "decided"]
    assert loop.world.committed == ([] if error else [loop.stops[0].step])


def test_an_error_stops_a_job_whose_stop_was_jumped_over() -> None:
    loop = Loop()
    loop.until(lambda: all(step >= 20 for step in loop.steps), lambda _: 10)
    loop.job.workers[1].request_stop("enough")
    beat(loop.world, loop.job.hosts)
    loop.world.coordinator.cut.want_stop("saves fail", "disk full")
    loop.until(lambda: len(loop.stops) == 2, lambda _: 10)
    assert {stop.error for stop in loop.stops.values()} == {"disk full"}


def test_a_stop_that_was_met_is_proposed_no_more() -> None:
    loop = Loop(told=None)
    loop.until(lambda: all(step >= 2 for step in loop.steps), lambda _: 1)
    loop.world.coordinator.cut.want_stop("saves fail", "disk full")
    beat(loop.world, loop.job.hosts)
    loop.until(lambda: len(loop.stops) == 2, lambda _: 1)
    stop = loop.stops[0]
    loop.until(lambda: loop.steps[0] > stop.step + 3, lambda _: 1)
    assert {s.id for s in loop.stops.values()} == {stop.id}
    assert [w.stop_state(stop) for w in loop.job.workers] == ["decided", "decided"]


def test_a_save_that_one_rank_jumps_over_ends_at_once_and_quietly() -> None:
    loop = Loop(told=None)
    first, second = loop.job.workers
    loop.until(lambda: all(step == 1 for step in loop.steps), lambda _: 1)
    first.request("r", "wanted")
    beat(loop.world, loop.job.hosts)
    (agreed,) = first.report().accepted
    assert agreed.state == "decided"
    loop.run(0, agreed.step - loop.steps[0])
    beat(loop.world, loop.job.hosts)
    assert agreed.step not in first.outcomes
    loop.run(1, agreed.step + 1 - loop.steps[1])
    beat(loop.world, loop.job.hosts, 2)
    assert first.outcomes[agreed.step].state == "failed"
    assert first.outcomes[agreed.step].quiet
    assert second.report().accepted[-1:] != (agreed,)
    loop.steps[0] += 1
    loop.until(lambda: "r" in first.request_outcomes, lambda _: 1)
    assert first.request_outcomes["r"].state == "committed"


def _refused_by_the_second(loop: Loop) -> int:
    """The step of a snapshot that only the first rank has, as the second refused it."""
    first, second = loop.job.workers
    for worker in (first, second):
        worker.reached(4, 1)
    first.request("r", "wanted")
    loop.job.hosts[0].beat()
    loop.job.hosts[0].beat()
    (proposal,) = first.report().accepted
    assert proposal.state == "open"
    loop.steps = [proposal.step - 1, proposal.step - 1]
    loop.run(0, 1)
    assert proposal.step in first.snapshots
    assert not second.reached(proposal.step + 1, 1)
    beat(loop.world, loop.job.hosts, 3)
    assert loop.world.coordinator.cut.proposals[proposal.id].state == "dropped"
    return proposal.step


def test_a_refused_save_ends_soon_and_quietly_though_nobody_goes_on() -> None:
    loop = Loop()
    step = _refused_by_the_second(loop)
    first = loop.job.workers[0]
    beat(loop.world, loop.job.hosts, 12)
    assert first.outcomes[step].quiet
    assert loop.world.coordinator.failures_in_a_row == 0
    assert loop.world.now < 10.0
    assert "r" not in first.request_outcomes
    loop.steps = [step, step]
    loop.until(lambda: "r" in first.request_outcomes, lambda _: 1)
    assert first.request_outcomes["r"].state == "committed"
    loop.serve("s", lambda _: 1)


def test_a_dropped_proposal_does_not_end_a_save_of_a_step_that_was_agreed_on_after_it() -> None:
    loop = Loop(told=None)
    first, second = loop.job.workers
    loop.until(lambda: all(step == 1 for step in loop.steps), lambda _: 1)
    first.request("r", "wanted")
    beat(loop.world, loop.job.hosts)
    (agreed,) = second.report().accepted
    cut = loop.world.coordinator.cut
    cut.proposals["older"] = replace(agreed, id="older", state="dropped")
    cut._entered["older"] = loop.world.now
    loop.run(0, agreed.step - loop.steps[0])
    beat(loop.world, loop.job.hosts, 30)
    loop.run(1, agreed.step - loop.steps[1])
    beat(loop.world, loop.job.hosts)
    assert loop.world.committed == [agreed.step]


def test_a_refused_step_that_the_other_rank_is_asked_to_save_is_saved() -> None:
    loop = Loop()
    step = _refused_by_the_second(loop)
    second = loop.job.workers[1]
    due = second.arrive(step, ask="explicit")
    assert due is not None
    assert due.snapshot == "explicit"
    loop.job.hosts[1].seal(second, step, "explicit")
    beat(loop.world, loop.job.hosts, 15)
    assert loop.world.committed == [step]


def test_an_explicit_save_of_a_refused_step_waits_for_all_ranks() -> None:
    loop = Loop()
    first, second = loop.job.workers
    for worker in (first, second):
        worker.reached(4, 1)
    first.request("r", "wanted")
    loop.job.hosts[0].beat()
    loop.job.hosts[0].beat()
    (proposal,) = first.report().accepted
    first.arrive(proposal.step, ask="explicit")
    loop.job.hosts[0].seal(first, proposal.step, "explicit")
    second.reached(proposal.step + 1, 1)
    beat(loop.world, loop.job.hosts, 30)
    assert first.outcomes == {}
    second.arrive(proposal.step, ask="explicit")
    loop.job.hosts[1].seal(second, proposal.step, "explicit")
    beat(loop.world, loop.job.hosts)
    assert loop.world.committed == [proposal.step]


def test_steps_between_which_runs_went_unheard_say_nothing_of_their_length() -> None:
    logic = WorkerLogic("w", 0, TWO)

    def offer(version: int, *proposals: Proposal) -> None:
        logic.on_view(1, version, WorkerView("w", generation=1, proposals=proposals))

    logic.reached(1, 1)
    offer(1, Proposal("a", 15))
    assert logic.reached(11, 1)
    logic.arrive(10)
    assert logic.reached(21, 1)
    logic.arrive(20)
    assert logic.report().stride == 10
    assert not logic.reached(31, 1)
    offer(2, Proposal("b", 45))
    assert logic.reached(41, 1)
    logic.arrive(40)
    assert logic.report().stride == 10


def test_what_was_decided_and_this_worker_is_not_bound_to_is_refused() -> None:
    """A coordinator that was restarted may know it from a rank that has not heard of its end."""
    logic = WorkerLogic("w", 0, TWO)
    decided = Proposal("a", 5, state="decided")
    logic.on_view(1, 1, WorkerView("w", generation=1, restore_done=True))
    logic.arrive(7)
    logic.on_view(2, 1, WorkerView("w", generation=1, proposals=(decided,)))
    assert logic.report().refused == ("a",)
    logic.on_view(2, 2, WorkerView("w", generation=1, proposals=(replace(decided, state="dropped"),)))
    assert logic.report().refused == ()


def test_a_step_that_was_met_is_not_refused_when_another_coordinator_tells_of_it() -> None:
    logic = WorkerLogic("w", 0, TWO)
    proposal = Proposal("a", 5, "stop", error="disk full")
    logic.on_view(1, 1, WorkerView("w", generation=1, proposals=(proposal,)))
    logic.on_view(1, 2, WorkerView("w", generation=1, proposals=(replace(proposal, state="decided"),)))
    assert logic.arrive(5) is not None
    logic.arrive(6)
    logic.on_view(2, 1, WorkerView("w", generation=1))
    assert logic.report().accepted == ()
    logic.on_view(2, 2, WorkerView("w", generation=1, proposals=(replace(proposal, state="decided"),)))
    assert logic.report().refused == ()
