"""The hooks' table, row by row: who is told what, which saver is used, and how sessions end. For TensorFlow's hook too.

A `FakeJob` stands for the `Checkpointer`; the rows about files are in test_hook_rows_files.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ray_ckpt
from tests.frontends.sessions import (
    Do,
    Event,
    Listener,
    Silent,
    driven,
    events,
    logged,
    model,
    session,
    session_logs,
    train,
)

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")

OURS = [ray_ckpt.CheckpointSaverHook, ray_ckpt.AsyncCheckpointSaverHook]
Make = Callable[..., Any]


def saves(noted: list[Event]) -> list[int]:
    """Steps of the saves that the first listener was told of."""
    return [event[2] for event in noted if event[:2] == ("A", "before")]


def test_row_22_a_stop_is_asked_for_after_all_listeners_were_told(make_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    listeners = [Listener("A", noted, stop_at=(4,)), Listener("B", noted)]
    assert train(make_hook(folder, save_steps=2, listeners=listeners), 9) == 4
    told = [("A", "before", 4), ("B", "before", 4), ("A", "after", 4), ("B", "after", 4)]
    assert noted[-6:] == [*told, ("A", "end", 4), ("B", "end", 4)]
    assert saves(noted) == [0, 2, 4]


def test_row_22_a_stop_asked_for_at_creation_or_in_end_is_ignored(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    assert train(make_any_hook(folder, save_steps=5, listeners=[Listener("A", noted, stop_at=(0, 3))]), 3) == 3
    assert saves(noted) == [0, 3]


def test_rows_23_and_24_what_listeners_are_given(make_any_hook: Make, folder: str) -> None:
    listener = Listener("A", [])
    with driven(make_any_hook(folder, save_steps=2, listeners=[listener])) as driver:
        driver.run(3)
    assert {type(step) for _, step in listener.arguments} == {np.int64}
    assert {id(given) for given, _ in listener.arguments} == {id(driver.raw)}


def test_row_25_session_logs(make_any_hook: Make, folder: str) -> None:
    train(make_any_hook(folder, save_steps=2, checkpoint_basename="mine"), 3)
    path = os.path.join(folder, "mine")
    assert session_logs(folder) == [(step, tf1.SessionLog.CHECKPOINT, path) for step in (0, 2, 3)]


def test_row_26_the_event_file_is_the_caches_and_stays_open(make_any_hook: Make, folder: str) -> None:
    hook = make_any_hook(folder, save_steps=2)
    train(hook, 3)
    assert hook._summary_writer is tf1.summary.FileWriterCache.get(folder)
    assert not hook._summary_writer._closed
    hook._summary_writer.add_summary(tf1.Summary(), 9)
    assert [event.step for event in events(folder, "summary")] == [9]


class Given:
    """Two savers of a model: of all variables, and of the step alone."""

    def __init__(self) -> None:
        self.all = tf1.train.Saver()
        self.step = tf1.train.Saver([tf1.train.get_global_step()])


@pytest.mark.parametrize("where", ["saver", "scaffold", "collection"])
def test_row_28_which_saver(make_hook: Make, folder: str, where: str) -> None:
    made = model()
    given = Given()
    tf1.add_to_collection(tf1.GraphKeys.SAVERS, given.step if where == "collection" else given.all)
    scaffold = tf1.train.Scaffold()
    arguments = {"saver": {"saver": given.step}, "scaffold": {"scaffold": scaffold}}.get(where, {})
    hook = make_hook(folder, save_steps=1, listeners=[Listener("A", [])], **arguments)
    hook.begin()
    # The scaffold's is read when it is needed, not before.
    scaffold._saver = given.step
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        hook.after_create_session(raw, None)
        assert given.step.last_checkpoints
        assert not given.all.last_checkpoints
        if where == "collection":
            # Kept from then on.
            tf1.get_collection_ref(tf1.GraphKeys.SAVERS)[:] = [given.all]
        raw.run(made.train)
        hook.after_run(tf1.train.SessionRunContext(None, raw), tf1.train.SessionRunValues(np.int64(1), None, None))
        hook.end(raw)
    assert [os.path.basename(path) for path in given.step.last_checkpoints] == ["model.ckpt-0", "model.ckpt-1"]
    assert not given.all.last_checkpoints


NO_SAVER = "No items in collection savers. Please add a saver to the collection or provide a saver or scaffold."
TWO_SAVERS = (
    "More than one item in collection savers. Please indicate which one to use by passing it to the constructor."
)


@pytest.mark.parametrize(("row", "savers", "message"), [(29, 0, NO_SAVER), (30, 2, TWO_SAVERS)])
def test_rows_29_and_30_the_collection_must_have_one_saver(
    make_any_hook: Make, folder: str, row: int, savers: int, message: str
) -> None:
    model()
    for _ in range(savers):
        tf1.add_to_collection(tf1.GraphKeys.SAVERS, tf1.train.Saver())
    hook = make_any_hook(folder, save_steps=1)
    hook.begin()
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        with pytest.raises(RuntimeError) as caught:
            hook.after_create_session(raw, None)
    assert str(caught.value) == message
    assert os.path.exists(os.path.join(folder, "graph.pbtxt"))


def run(*hooks: Any) -> None:
    """Run a session with these hooks until one of them ends it."""
    made = model()
    with session(*hooks) as opened:
        while True:
            opened.run(made.train)


class Unlucky(Listener):
    """Raises before the save of one step."""

    def before_save(self, session: Any, global_step_value: Any) -> None:
        super().before_save(session, global_step_value)
        if global_step_value == 2:
            raise KeyError("unlucky")


def test_row_35_an_exception_skips_after_run_and_end(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []

    def fail(_: Any) -> None:
        raise KeyError("training failed")

    hook = make_any_hook(folder, save_steps=2, listeners=[Listener("A", noted)])
    with pytest.raises(KeyError, match="training failed"):
        run(Do(fail, before=(4,)), hook)
    assert saves(noted) == [0, 2]
    assert not [event for event in noted if event[1] == "end"]


@pytest.mark.parametrize("error", [tf.errors.OutOfRangeError(None, None, "no more"), StopIteration()])
def test_row_36_out_of_range_and_stop_iteration_end_well(make_any_hook: Make, folder: str, error: Exception) -> None:
    noted: list[Event] = []

    def fail(_: Any) -> None:
        raise error

    run(Do(fail, before=(4,)), make_any_hook(folder, save_steps=2, listeners=[Listener("A", noted)]))
    assert saves(noted) == [0, 2, 3]
    assert noted[-1] == ("A", "end", 3)


def test_row_37_end_saves_the_last_step_unless_it_is_saved(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    train(make_any_hook(folder, save_steps=2, listeners=[Listener("A", noted)]), 4)
    assert saves(noted) == [0, 2, 4]
    assert noted[-1] == ("A", "end", 4)


def test_row_40_a_listener_that_raises_raises_from_the_run_with_the_timer_set(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    hook = make_any_hook(folder, save_steps=2, listeners=[Unlucky("A", noted)])
    with driven(hook) as driver:
        driver.run(1)
        with pytest.raises(KeyError, match="unlucky"):
            driver.run(1)
        assert hook._timer.last_triggered_step() == 2
        driver.run(2)
    assert saves(noted) == [0, 2, 4]


@pytest.mark.parametrize("ours", OURS)
def test_row_41_the_graph_is_the_sessions_whatever_the_default_is(fake_job: Any, folder: str, ours: Any) -> None:
    hook = ours(folder, save_steps=1)
    with tf.Graph().as_default() as graph:
        model()
        tf1.add_to_collection(tf1.GraphKeys.SAVERS, tf1.train.Saver())
        hook.begin()
        initialize = tf1.global_variables_initializer()
    with tf1.Session(graph=graph) as raw, tf.Graph().as_default():
        raw.run(initialize)
        hook.after_create_session(raw, None)
        hook.end(raw)
    with open(os.path.join(folder, "graph.pbtxt")) as file:
        assert 'name: "weights"' in file.read()
    with open(os.path.join(folder, "model.ckpt-0.meta"), "rb") as meta:
        assert "weights" in [node.name for node in tf1.MetaGraphDef.FromString(meta.read()).graph_def.node]


def test_row_43_log_of_the_hook(make_hook: Make, folder: str) -> None:
    with logged() as lines:
        listener = Listener("A", [], stop_at=(1,))
        train(make_hook(folder, save_steps=1, listeners=[listener]), 2)
    path = os.path.join(folder, "model.ckpt")
    ours = [line for line in lines if "Checkpoint" in line or "checkpoint" in line]
    expected = ["Create CheckpointSaverHook."]
    for step in (0, 1):
        expected += [
            f"Calling checkpoint listeners before saving checkpoint {step}...",
            f"Saving checkpoints for {step} into {path}.",
            f"Calling checkpoint listeners after saving checkpoint {step}...",
        ]
        expected += [f"A CheckpointSaverListener requested that training be stopped. listener: {listener}"] * step
    assert ours == expected


def test_row_43_log_of_the_asynchronous_hook(fake_job: Any, folder: str) -> None:
    with logged() as lines:
        train(ray_ckpt.AsyncCheckpointSaverHook(folder, save_steps=5), 2)
    path = os.path.join(folder, "model.ckpt")
    ours = [line for line in lines if "ting for any" in line or "Checkpoint" in line or "Triggering" in line]
    assert ours == [
        "Create AsyncCheckpointSaverHook.",
        "Create CheckpointSaverHook.",
        "Triggering checkpoint. 0",
        f"Checkpoint finished for 0 into {path}.",
        "Waiting for any pending checkpoints to finish.",
        "Triggering checkpoint. 2",
        f"Checkpoint finished for 2 into {path}.",
    ]


@pytest.mark.parametrize("ours", OURS)
def test_row_44_both_are_tensorflows_class(ours: Any) -> None:
    hook = ours("d", save_steps=1)
    assert isinstance(hook, tf1.train.CheckpointSaverHook)
    assert isinstance(hook, tf1.train.SessionRunHook)
    assert isinstance(hook, ray_ckpt.CheckpointSaverHook)


def test_row_45_an_estimator_adds_listeners_to_the_hook_that_it_finds(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    hook = make_any_hook(folder, save_steps=2)
    # As `Estimator._train_with_estimator_spec` and TPUEstimator do.
    found = [h for h in [hook] if isinstance(h, tf1.train.CheckpointSaverHook)]
    found[0]._listeners.extend([Listener("A", noted)])
    found[0]._set_steps_per_run(1)
    train(hook, 3)
    assert saves(noted) == [0, 2, 3]


@pytest.mark.parametrize("secs", [600, None, 0])
def test_row_46_beside_the_savers_of_a_monitored_training_session(make_hook: Make, folder: str, secs: Any) -> None:
    order: list[str] = []
    other = folder + "-other"

    class First(Silent):
        """Of the chief-only hook."""

        def begin(self) -> None:
            order.append("chief only")

    class Last(Silent):
        """Of the hook."""

        def begin(self) -> None:
            order.append("hook, after an event file" if os.path.exists(other) else "hook")

    made = model()
    chief = make_hook(folder, save_steps=1, listeners=[First()])
    hook = make_hook(folder, save_steps=1, listeners=[Last()])
    with session(hook, folder=other, save_checkpoint_secs=secs, chief_only_hooks=[chief]) as opened:
        opened.run(made.train)
        mine = [h for h in opened._hooks if isinstance(h, tf1.train.CheckpointSaverHook)]
    assert order == ["chief only", "hook, after an event file" if secs else "hook"]
    assert mine[0] is chief
    assert mine[-1] is hook
    assert len(mine) == (3 if secs else 2)
