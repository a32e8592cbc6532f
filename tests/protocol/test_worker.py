"""One training process's rules: what is due at which step, and what it votes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_ckpt.errors import UsageError
from ray_ckpt.protocol.messages import JobConfig, Proposal, RestoreDecision, SaveOutcome, WorkerView
from ray_ckpt.protocol.worker import WorkerLogic
from ray_ckpt.types import Checkpoint


def worker(restored: int | None = None, **settings: object) -> WorkerLogic:
    logic = WorkerLogic("w", 0, JobConfig(world_size=2, **settings))  # type: ignore[arg-type]
    chosen = Checkpoint(restored, "p", "a", 0, 0.0, 1, 1, 2) if restored is not None else None
    view(logic, restore=RestoreDecision(1, 1, chosen), restore_done=True)
    return logic


_versions = iter(range(1, 10_000))


def view(logic: WorkerLogic, epoch: int = 1, **content: object) -> None:
    logic.on_view(epoch, next(_versions), WorkerView("w", generation=1, **content))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("restored", "steps", "saved"),
    [
        (None, [1, 2, 3, 4, 5, 6], [3, 6]),
        (None, [0, 1, 2, 3], [3]),
        (None, [2, 4, 6, 8], [4, 6]),
        (None, [10], [10]),
        (3, [4, 5, 6], [6]),
        (3, [3, 4], []),
        (4, [5, 6, 7], [6]),
    ],
)
def test_step_cadence(restored: int | None, steps: list[int], saved: list[int]) -> None:
    logic = worker(restored, save_steps=3)
    due = []
    for step in steps:
        asked = logic.arrive(step)
        if asked is not None:
            logic.snapshotted(step, "cadence")
            due.append(step)
    assert due == saved


@pytest.mark.parametrize("overlap", ["skip", "coalesce"])
def test_skipping_is_decided_for_all_at_once_so_no_worker_saves_by_itself(overlap: str) -> None:
    logic = worker(save_steps=1, overlap=overlap)
    assert logic.arrive(1) is None


@pytest.mark.parametrize(("first", "second"), [(5, 5), (5, 4)])
def test_steps_must_increase(first: int, second: int) -> None:
    logic = worker()
    logic.arrive(first)
    with pytest.raises(UsageError, match=f"step {second} follows step {first}"):
        logic.arrive(second)


def test_steps_start_after_the_restored_one() -> None:
    with pytest.raises(UsageError, match="start the loop at 8"):
        worker(restored=7).arrive(6)


def test_a_proposal_is_accepted_only_before_its_step_is_reached() -> None:
    logic = worker()
    logic.arrive(5)
    view(logic, proposals=(Proposal("a", 5), Proposal("b", 6)))
    report = logic.report()
    assert [p.id for p in report.accepted] == ["b"]
    assert report.refused == ("a",)
    due = logic.arrive(6)
    assert due is not None
    assert due.snapshot == "proposal"


def test_a_promise_that_the_stride_jumps_over_is_taken_back() -> None:
    logic = worker()
    logic.arrive(5)
    view(logic, proposals=(Proposal("a", 7),))
    assert logic.arrive(8) is None
    assert logic.report().refused == ("a",)


def test_a_dropped_proposal_asks_for_nothing() -> None:
    logic = worker()
    view(logic, proposals=(Proposal("a", 7),))
    view(logic, proposals=(Proposal("a", 7, state="dropped"),))
    assert logic.arrive(7) is None


def test_a_stop_is_open_until_it_is_decided() -> None:
    logic = worker()
    view(logic, proposals=(Proposal("a", 7, "stop"),))
    due = logic.arrive(7)
    assert due is not None
    assert due.stop is not None
    assert logic.stop_state(due.stop) == "open"
    view(logic, proposals=(Proposal("a", 7, "stop", "decided"),))
    assert logic.stop_state(due.stop) == "decided"


def test_an_older_view_changes_nothing() -> None:
    logic = worker()
    logic.on_view(2, 1, WorkerView("w", generation=1, late="new"))
    logic.on_view(1, 999_999, WorkerView("w", generation=1, late="old"))
    assert logic.late == "new"


def test_a_save_that_ended_while_its_snapshot_waited_is_heard_of() -> None:
    logic = worker(save_steps=1)
    assert logic.arrive(1) is not None
    assert logic.report().due_step == 1
    assert logic.report().pending == ()
    view(logic, outcomes=(SaveOutcome(1, 1, "failed", error="late"),))
    assert logic.outcomes[1].error == "late"


def test_the_snapshot_for_a_dropped_proposal_is_off() -> None:
    logic = worker()
    view(logic, proposals=(Proposal("a", 5),))
    due = logic.arrive(5)
    assert due is not None
    assert due.snapshot == "proposal"
    logic.await_plan(5)
    assert not logic.is_off(5, "proposal")
    view(logic, proposals=(Proposal("a", 5, state="dropped"),))
    assert logic.is_off(5, "proposal")
    assert not logic.is_off(5, "explicit"), "who is asked for it waits for the other ranks"
    logic.go_on()
    assert (logic.report().due_step, logic.report().waiting_step) == (None, None)


def test_who_has_finished_accepts_nothing_more() -> None:
    logic = worker()
    logic.arrive(5)
    view(logic, proposals=(Proposal("a", 9),))
    logic.finish()
    view(logic, proposals=(Proposal("a", 9), Proposal("b", 12)))
    assert logic.report().accepted == ()
    assert logic.report().refused == ("a", "b")


def test_a_loop_that_tells_only_a_bound_accepts_nothing_up_to_it() -> None:
    logic = worker()
    assert not logic.reached(10)
    view(logic, proposals=(Proposal("late", 10), Proposal("early", 11)))
    report = logic.report()
    assert ([p.id for p in report.accepted], report.refused) == (["early"], ("late",))
    assert (report.step, report.bound, report.reached) == (-1, 10, 10)


def test_a_bound_asks_for_real_steps_while_one_is_agreed_on() -> None:
    logic = worker()
    assert not logic.reached(2)
    view(logic, proposals=(Proposal("p", 4),))
    assert logic.reached(3)
    assert logic.arrive(2) is None
    assert logic.reached(4)
    assert logic.arrive(3) is None
    due = logic.arrive(4)
    assert due is not None
    assert (due.step, due.snapshot) == (4, "proposal")
    logic.snapshotted(4, "proposal")
    assert not logic.reached(5)


def test_a_bound_asks_for_no_more_steps_once_the_proposal_is_dropped() -> None:
    logic = worker()
    view(logic, proposals=(Proposal("p", 4),))
    assert logic.reached(1)
    view(logic, proposals=(Proposal("p", 4, state="dropped"),))
    assert not logic.reached(2)


def test_a_bound_does_not_fall_and_real_steps_may_lie_below_it() -> None:
    logic = worker(save_steps=4)
    logic.reached(9)
    logic.reached(5)
    assert logic.report().bound == 9
    assert logic.arrive(3) is None
    due = logic.arrive(4)
    assert due is not None
    assert due.snapshot == "cadence"
    assert logic.report().step == 4


def test_a_bound_asks_for_a_stop_that_all_have_agreed_on() -> None:
    logic = worker()
    stop = Proposal("s", 3, "stop")
    view(logic, proposals=(stop,))
    view(logic, proposals=(replace(stop, state="decided"),))
    assert logic.reached(2)
    due = logic.arrive(3)
    assert due is not None
    assert due.stop is not None
    assert logic.stop_state(due.stop) == "decided"
