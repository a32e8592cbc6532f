"""Saves and stops that a hook's `Checkpointer` has agreed on with other workers, or that were asked for from outside.

A `FakeJob` stands for the `Checkpointer`; workers as processes are in test_hook_workers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import tensorflow as tf

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook
from tests.frontends.sessions import Event, Listener, driven, logged, model

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")


def told(noted: list[Event], what: str = "after") -> list[int]:
    """Steps that the listeners were told of."""
    return [event[2] for event in noted if event[1] == what]


def test_a_save_that_was_agreed_on_moves_the_timer(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    with driven(CheckpointSaverHook(folder, save_steps=4, listeners=[Listener("A", noted)])) as driver:
        driver.run(1)
        fake_job.jobs[0].agreed.append(3)
        assert not driver.run(6)
        assert told(noted) == [0, 3, 7]
        fake_job.jobs[0].agreed.append(8)
        driver.run(1)
        # A stop may be agreed on for a step that is saved already, or without a save.
        fake_job.jobs[0].agreed.append(10)
        fake_job.jobs[0].should_stop = True
        assert driver.run(1)
    assert told(noted) == [0, 3, 7, 8, 9]
    assert len(fake_job.jobs) == 1
    # The bound of each run: what was read with it, and the steps of one more run; and how many those are.
    assert fake_job.jobs[0].bounds == [(step, 1) for step in range(2, 11)]


def test_several_workers_by_seconds_save_where_they_agree(fake_job: Any, folder: str) -> None:
    for rank in (0, 1):
        noted: list[Event] = []
        hook = CheckpointSaverHook(folder, save_secs=1e-9, rank=rank, world_size=2, listeners=[Listener("A", noted)])
        with tf.Graph().as_default(), driven(hook) as driver:
            driver.run(1)
            job = fake_job.jobs[rank]
            assert job.requests == ["save_secs"] * (rank == 0)
            assert told(noted) == [0]
            job.agreed.append(2)
            driver.run(1)
            assert told(noted) == [0, 2]


def test_a_save_may_be_due_before_one_that_is_agreed_on(fake_job: Any, folder: str) -> None:
    """And the loop may end before: it is the same start of the job still."""
    noted: list[Event] = []
    hook = CheckpointSaverHook(folder, save_steps=4, listeners=[Listener("A", noted)])
    with driven(hook) as driver:
        driver.run(2)
        fake_job.jobs[0].agreed.append(50)
        driver.run(7)
    assert told(noted) == [0, 4, 8, 9]
    assert len(fake_job.jobs) == 1


def test_row_14_runs_of_several_steps_come_to_the_step_that_is_agreed_on(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    hook = CheckpointSaverHook(folder, save_steps=1000, steps_per_run=5, listeners=[Listener("A", noted)])
    with driven(hook, made=model(stride=5)) as driver:
        driver.run(1)
        fake_job.jobs[0].agreed.append(15)
        driver.run(3)
    assert told(noted) == [0, 15, 20]
    assert fake_job.jobs[0].bounds == [(step + 5, 5) for step in (5, 10, 15, 20)]
    assert len(fake_job.jobs) == 1


def test_by_steps_the_timers_of_several_workers_stay_alike(fake_job: Any, folder: str) -> None:
    """Another worker may have refused the step that this one has agreed to: that one's timer knows nothing of it."""
    noted: list[Event] = []
    hook = CheckpointSaverHook(folder, save_steps=4, rank=1, world_size=2, listeners=[Listener("A", noted)])
    with driven(hook) as driver:
        driver.run(1)
        fake_job.jobs[0].agreed += [3, 8]
        driver.run(8)
    # The save of step 8 is due by both.
    assert told(noted) == [0, 3, 4, 8, 9]
    assert len(fake_job.jobs) == 1


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_that_another_worker_refused_is_no_failure(fake_job: Any, folder: str, blocking: bool) -> None:
    noted: list[Event] = []
    fake_job.quiet = frozenset({3})
    hook = AsyncCheckpointSaverHook(
        folder, save_steps=4, rank=0, world_size=2, listeners=[Listener("A", noted)], blocking=blocking
    )
    with logged() as lines, driven(hook) as driver:
        driver.run(1)
        fake_job.jobs[0].agreed.append(3)
        driver.run(5)
    assert told(noted, "before") == [0, 3, 4, 6]
    assert told(noted) == [0, 4, 6]
    assert not [line for line in lines if "not saved" in line]


@pytest.mark.parametrize("held", [True, False])
def test_the_last_step_is_saved_though_workers_did_not_agree_on_it(fake_job: Any, folder: str, held: bool) -> None:
    noted: list[Event] = []
    fake_job.held = held
    hook = AsyncCheckpointSaverHook(folder, save_steps=4, rank=0, world_size=2, listeners=[Listener("A", noted)])
    with driven(hook) as driver:
        driver.run(1)
        first = fake_job.jobs[0]
        first.quiet = frozenset({3})
        first.agreed.append(3)
        driver.run(2)
    # A job takes no step twice, so this is another start of it.
    assert [list(job.values) for job in fake_job.jobs] == [[0, 3], [3]]
    assert told(noted) == [0, 3]
    assert noted[-1] == ("A", "end", 3)


def test_several_workers_stop_where_they_agree_when_a_listener_asks(fake_job: Any, folder: str) -> None:
    listener = Listener("A", [], stop_at=(0, 2))
    hook = CheckpointSaverHook(folder, save_steps=2, rank=1, world_size=2, listeners=[listener])
    with driven(hook) as driver:
        assert not driver.run(3)
        job = fake_job.jobs[0]
        assert job.stops == ["a CheckpointSaverListener asks for it"]
        job.agreed.append(5)
        assert not driver.run(1)
        job.should_stop = True
        assert driver.run(1)
