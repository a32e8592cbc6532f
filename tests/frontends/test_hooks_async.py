"""What the hooks do while saves are under way: who is told when, and what becomes of errors, stops and lost sessions.

A `FakeJob` stands for the `Checkpointer`: it commits when a test says so.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook
from ray_ckpt.errors import SaveError, StateError
from ray_ckpt.frontends.tensorflow import hooks
from tests.frontends.sessions import (
    Do,
    Event,
    Listener,
    Silent,
    driven,
    logged,
    model,
    present,
    session,
    session_logs,
    train,
)

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")


def told(noted: list[Event], what: str = "after") -> list[int]:
    """Steps that the listeners were told of."""
    return [event[2] for event in noted if event[1] == what]


def test_training_goes_on_while_saves_are_under_way(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True
    with driven(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)])) as driver:
        driver.run(5)
        # One that falls due while another is under way is taken too.
        assert told(noted, "before") == [0, 2, 4]
        assert told(noted) == []
        assert present(folder, ".meta") == []
        assert session_logs(folder) == []
        job = fake_job.jobs[0]
        job.decide(0)
        driver.run(1)
        assert told(noted) == [0]
        assert present(folder, ".meta") == [0]
        assert [log[0] for log in session_logs(folder)] == [0]
    assert told(noted) == [0, 2, 4, 6]
    assert noted[-1] == ("A", "end", 6)


def test_listeners_are_told_in_the_order_of_steps(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True
    with driven(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)])) as driver:
        driver.run(4)
        job = fake_job.jobs[0]
        job.decide(4)
        job.decide(2)
        driver.run(1)
        assert told(noted) == []
        job.decide(0)
        driver.run(1)
        assert told(noted) == [0, 2, 4]


def test_values_are_of_the_step_that_the_save_is_named_after(fake_job: Any, folder: str) -> None:
    fake_job.held = True
    train(AsyncCheckpointSaverHook(folder, save_steps=3), 8)
    values = fake_job.jobs[0].values
    assert {step: (int(v["global_step"]), float(v["weights"][0])) for step, v in values.items()} == {
        step: (step, 10.0 * step) for step in (0, 3, 6, 8)
    }


def test_a_stop_counts_from_the_commit(fake_job: Any, folder: str) -> None:
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", [], stop_at=(0, 2))])
    with driven(hook) as driver:
        assert not driver.run(3)
        fake_job.jobs[0].decide(0)
        # The one at session creation is ignored, whenever it is told.
        assert not driver.run(1)
        fake_job.jobs[0].decide(2)
        assert driver.run(1)
        assert not driver.run(1)


def test_a_failed_save_is_raised_from_the_next_run(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held, fake_job.fails = True, frozenset({2})
    with driven(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)])) as driver:
        driver.run(2)
        fake_job.jobs[0].decide(0)
        fake_job.jobs[0].decide(2)
        with pytest.raises(SaveError, match=r"model\.ckpt: step 2 was not saved: no space left"):
            driver.run(1)
        driver.run(1)
    # Told once, and the saves after it are not lost.
    assert told(noted) == [0, 4]


def test_a_failed_save_is_raised_from_its_run_where_that_waits(fake_job: Any, folder: str) -> None:
    fake_job.fails = frozenset({2})
    hook = CheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", [])])
    with driven(hook) as driver:
        driver.run(1)
        with pytest.raises(SaveError, match="step 2 was not saved"):
            driver.run(1)
        assert hook._timer.last_triggered_step() == 2


def test_a_failed_save_is_only_told_with_on_error_warn(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.fails = frozenset({2, 5})
    with logged() as lines:
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)], on_error="warn"), 5)
    assert [line for line in lines if "was not saved" in line] == [
        f"{os.path.join(folder, 'model.ckpt')}: step {step} was not saved: no space left" for step in (2, 5)
    ]
    assert told(noted) == [0, 4]
    assert noted[-1] == ("A", "end", 5)


def test_a_failed_last_save_is_raised_from_end(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.fails = frozenset({3})
    with pytest.raises(SaveError, match="step 3 was not saved"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 3)
    assert told(noted, "end") == []
    assert fake_job.jobs[0].ended == "left"


def test_a_save_that_failed_does_not_cost_the_last_one(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held, fake_job.fails = True, frozenset({2})
    with pytest.raises(SaveError, match="step 2 was not saved"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 3)
    assert told(noted) == [0, 3]
    assert told(noted, "end") == []


def test_several_workers_are_stopped_by_the_checkpointer_but_hear_of_it_in_the_end(fake_job: Any, folder: str) -> None:
    fake_job.held, fake_job.fails = True, frozenset({2, 4})
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, rank=0, world_size=2)
    with logged() as lines, pytest.raises(SaveError, match="step 4 was not saved"):
        run_while_step_2_fails(hook, fake_job)
    assert [line for line in lines if "step 2 was not saved" in line]


def run_while_step_2_fails(hook: Any, fake_job: Any) -> None:
    """Four steps; in the middle of them the save of step 2 is decided."""
    with driven(hook) as driver:
        driver.run(2)
        fake_job.jobs[0].decide(0)
        fake_job.jobs[0].decide(2)
        driver.run(2)


def test_end_waits_for_the_saves_under_way_and_for_the_last(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True
    train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 3)
    assert noted[-5:] == [
        *[("A", "after", 0), ("A", "after", 2)],
        *[("A", "before", 3), ("A", "after", 3), ("A", "end", 3)],
    ]
    assert fake_job.jobs[0].ended == "closed"


def test_a_stop_of_one_session_does_not_end_the_next(fake_job: Any, folder: str) -> None:
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", [], stop_at=(2,))])
    with driven(hook) as driver:
        driver.run(2)
        hook.wait()
    with tf.Graph().as_default(), driven(hook) as driver:
        assert not driver.run(1)
    assert len(fake_job.jobs) == 2


def test_wait_tells_listeners_and_remembers_a_stop(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted, stop_at=(2,))])
    hook.wait()
    with driven(hook) as driver:
        driver.run(3)
        hook.wait(timeout_s=5.0)
        assert told(noted) == [0, 2]
        assert driver.run(1)
    hook.wait()
    assert told(noted) == [0, 2, 4]


@pytest.mark.parametrize(
    ("hook", "listener", "blocking", "waits"),
    [
        (CheckpointSaverHook, Listener, None, True),
        (CheckpointSaverHook, Silent, None, False),
        (CheckpointSaverHook, Listener, False, False),
        (CheckpointSaverHook, Silent, True, True),
        (AsyncCheckpointSaverHook, Listener, None, False),
        (AsyncCheckpointSaverHook, Listener, True, True),
    ],
)
def test_who_waits_for_the_commit(
    fake_job: Any, folder: str, hook: Any, listener: Any, blocking: bool | None, waits: bool
) -> None:
    fake_job.held = True
    listeners = [Listener("A", [])] if listener is Listener else [Silent()]
    with driven(hook(folder, save_steps=2, listeners=listeners, blocking=blocking)) as driver:
        assert list(fake_job.jobs[0].outcomes) == [0] * waits
        driver.run(2)
        assert list(fake_job.jobs[0].outcomes) == [0, 2] * waits


class AnyObject:
    """Has a listener's methods, but is none."""

    def __init__(self) -> None:
        self.before_save = self.end = lambda session, step: None
        self.after_save = lambda session, step: step == 2

    def begin(self) -> None:
        """Nothing to do."""


def test_a_listener_of_any_class_is_told_and_waited_for(fake_job: Any, folder: str) -> None:
    fake_job.held = True
    with driven(CheckpointSaverHook(folder, save_steps=2, listeners=[AnyObject()])) as driver:
        assert list(fake_job.jobs[0].outcomes) == [0]
        assert driver.run(2)


def test_before_snapshot_comes_after_the_listeners_and_before_the_values(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    made: list[Any] = []

    def pull(raw: Any) -> None:
        noted.append(("pull", "before", 0))
        made[0].weights.load([7.0, 7.0, 7.0], raw)

    hook = CheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)], before_snapshot=pull)
    made.append(model())
    tf1.add_to_collection(tf1.GraphKeys.SAVERS, tf1.train.Saver())
    hook.begin()
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        hook.after_create_session(raw, None)
        hook.end(raw)
    assert noted[1:4] == [("A", "before", 0), ("pull", "before", 0), ("A", "after", 0)]
    assert fake_job.jobs[0].values[0]["weights"].tolist() == [7.0, 7.0, 7.0]


def test_only_the_first_rank_writes_what_lies_beside(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    train(CheckpointSaverHook(folder, save_steps=1, rank=1, world_size=2, listeners=[Listener("A", noted)]), 2)
    assert not os.path.exists(folder)
    assert told(noted) == [0, 1, 2]


def test_a_step_set_back_is_another_start_of_the_job(fake_job: Any, folder: str) -> None:
    hook = CheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", [])])
    with driven(hook) as driver:
        driver.run(6)
        driver.set_step(2)
        hook._timer.update_last_triggered_step(1)
        driver.run(1)
    first, second = fake_job.jobs
    assert list(first.values) == [0, 2, 4, 6]
    assert first.ended == "left"
    # The newest that lies before: what was saved after it is not where training came from.
    assert second.adopted == [2]
    assert list(second.values) == [3]
    assert second.settings["keep_before"] == 1


def test_a_lost_session_is_another_start_and_what_it_saved_is_told(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True

    def lose(_: Any) -> None:
        raise tf.errors.UnavailableError(None, None, "lost")

    made = model()
    listener = Listener("A", noted, stop_at=(2,))
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[listener])
    with session(Do(lose, before=(4,)), hook) as opened:
        for _ in range(4):
            opened.run(made.train)
        # A save of the lost session asked for a stop.
        assert opened.should_stop()
    first, second = fake_job.jobs
    assert first.ended == "left"
    assert (first.adopted, second.adopted) == ([None], [0])
    assert noted[1:] == [
        *[("A", "before", 0), ("A", "before", 2), ("A", "after", 0), ("A", "after", 2)],
        *[("A", "before", 0), ("A", "after", 0), ("A", "before", 1), ("A", "after", 1), ("A", "end", 1)],
    ]
    assert (first.settings["keep_before"], second.settings["keep_before"]) == (0, 1)


def test_where_another_process_trains_too_the_save_is_named_after_its_values(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    train_op: list[Any] = []
    hook = CheckpointSaverHook(
        folder, save_steps=2, listeners=[Listener("A", noted)], before_snapshot=lambda raw: raw.run(train_op)
    )
    with driven(hook) as driver:
        train_op.append(driver.made.train)
        driver.run(2)
        train_op.clear()
    assert told(noted, "before") == [0, 2]
    assert told(noted) == [0, 3]
    assert float(fake_job.jobs[0].values[3]["weights"][0]) == 30.0


def test_several_workers_must_not_train_while_they_save(fake_job: Any, folder: str) -> None:
    train_op: list[Any] = []
    hook = CheckpointSaverHook(
        folder, save_steps=2, rank=0, world_size=2, before_snapshot=lambda raw: raw.run(train_op)
    )
    with driven(hook) as driver:
        train_op.append(driver.made.train)
        driver.run(1)
        with pytest.raises(StateError, match="the global step went from 2 to 3"):
            driver.run(1)
        train_op.clear()


def fail(_: Any) -> None:
    """A step of training."""
    raise KeyError("training failed")


def broken_session(*hooks: Any) -> None:
    """A job that saves step 0 and 2, and fails at its fourth run."""
    made = model()
    with session(Do(fail, before=(4,)), *hooks) as opened:
        while True:
            opened.run(made.train)


def test_after_an_exception_the_next_session_finishes_what_was_under_way(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)])
    with pytest.raises(KeyError, match="training failed"):
        broken_session(hook)
    assert (present(folder, ".meta"), fake_job.jobs[0].ended) == ([], "")
    train(hook, 1)
    assert fake_job.jobs[0].ended == "left"
    assert present(folder, ".meta") == [0, 1, 2]
    assert [log[0] for log in session_logs(folder)] == [0, 2, 0, 1]
    # Nobody was told of the first session's saves, as TensorFlow's hook tells nobody after an exception.
    assert told(noted) == [0, 1]


def test_after_an_exception_the_end_of_the_process_finishes_it(
    fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_job.held = True
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    with pytest.raises(KeyError, match="training failed"):
        broken_session(hook)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    hooks._settle_all()
    assert (present(folder, ".meta"), fake_job.jobs[0].ended) == ([0, 2], "left")


@pytest.mark.parametrize("agreed", [None, 3, 50])
def test_after_an_exception_nothing_stays_once_the_hook_is_gone(fake_job: Any, folder: str, agreed: int | None) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    agree = Do(lambda _: fake_job.jobs[0].agreed.append(agreed), after=(1,) if agreed else ())
    with pytest.raises(KeyError, match="training failed"):
        broken_session(hook, agree)
    del agree
    del hook
    gc.collect()
    assert fake_job.jobs[0].ended == "left"


def test_a_run_that_saves_nothing_asks_the_session_for_nothing(fake_job: Any, folder: str) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=100)
    with driven(hook) as driver:
        hook.wait()

        class Untouched:
            """A session that may not be used."""

        context = tf1.train.SessionRunContext(None, Untouched())
        hook._saves.session = context.session
        hook.after_run(context, tf1.train.SessionRunValues(np.int64(5), None, None))
        hook._saves.session = driver.raw
