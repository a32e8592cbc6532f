"""The hooks' table, row by row: what is decided when, and who is told. Most tests hold for TensorFlow's hook too.

A `FakeJob` stands for the `Checkpointer`; the rows about files are in test_hook_rows_files.py.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.training import basic_session_run_hooks

import ray_ckpt
from tests.frontends.sessions import (
    Clock,
    Do,
    Event,
    Listener,
    Runs,
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


def names(hook: Any) -> list[str]:
    """The names of a hook's arguments."""
    found = inspect.signature(hook).parameters.values()
    return [p.name for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD]


def test_row_01_arguments() -> None:
    theirs = names(tf1.train.CheckpointSaverHook)
    assert theirs[7:] == ["save_graph_def"]
    assert names(ray_ckpt.CheckpointSaverHook) == [*theirs[:7], "steps_per_run", "save_graph_def"]
    assert names(ray_ckpt.AsyncCheckpointSaverHook) == theirs[:7]
    with pytest.raises(TypeError, match="unexpected keyword argument 'save_step'"):
        ray_ckpt.CheckpointSaverHook("d", save_steps=1, save_step=2)


def test_row_02_steps_per_run_is_an_argument_and_has_tensorflows_setter() -> None:
    assert ray_ckpt.CheckpointSaverHook("d", save_steps=1)._steps_per_run == 1
    assert ray_ckpt.CheckpointSaverHook("d", None, 1, None, "m", None, None, 7)._steps_per_run == 7
    hook = ray_ckpt.AsyncCheckpointSaverHook("d", save_steps=1)
    hook._set_steps_per_run(9)
    assert hook._steps_per_run == 9


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        (3, {"saver": object(), "scaffold": object()}, "You cannot provide both saver and scaffold."),
        (4, {}, "Either every_secs or every_steps should be provided."),
        (5, {"save_secs": 1, "save_steps": 1}, "Can not provide both every_secs and every_steps."),
    ],
)
def test_rows_03_to_05_wrong_arguments(make_any_hook: Make, row: int, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        make_any_hook("d", **arguments)
    assert type(caught.value) is ValueError


def test_row_06_the_constructor_touches_neither_folder_nor_graph(make_any_hook: Make, folder: str) -> None:
    make_any_hook(folder, save_steps=1)
    assert not os.path.exists(folder)
    assert not tf1.get_default_graph().get_operations()


class AddsAnOp(Listener):
    """`begin` may add to the graph, and the tensor that reads the step is there already."""

    def begin(self) -> None:
        super().begin()
        self.reads = tf1.get_collection("global_step_read_op_cache")
        tf.constant(1.0, name=f"of_{self.name}")


def test_row_07_begin_makes_folder_event_file_and_step_tensor_then_calls_listeners(
    make_any_hook: Make, folder: str
) -> None:
    model()
    noted: list[Event] = []
    listeners = [AddsAnOp("A", noted), AddsAnOp("B", noted)]
    hook = make_any_hook(folder, save_steps=1, listeners=listeners)
    hook.begin()
    assert noted == [("A", "begin"), ("B", "begin")]
    assert listeners[0].reads == [hook._global_step_tensor]
    assert tf1.get_default_graph().get_operation_by_name("of_B")
    graphs = [tf1.GraphDef.FromString(e.graph_def) for e in events(folder, "graph_def")]
    assert [node.name for node in graphs[0].node] == [o.name for o in model_before_begin()]


def model_before_begin() -> list[Any]:
    """The ops of a model that no hook has seen."""
    with tf.Graph().as_default() as graph:
        model()
    return graph.get_operations()


def test_row_08_no_global_step(make_any_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    with pytest.raises(RuntimeError) as caught:
        make_any_hook(folder, save_steps=1, listeners=[Listener("A", noted)]).begin()
    assert str(caught.value) == "Global step should be created to use CheckpointSaverHook."
    assert os.path.isdir(folder)
    assert noted == []


def test_row_09_begin_is_called_once_a_monitored_session(make_hook: Make, folder: str) -> None:
    noted: list[Event] = []

    def lose(_: Any) -> None:
        raise tf.errors.AbortedError(None, None, "lost")

    made = model()
    with session(Do(lose, before=(2,)), make_hook(folder, save_steps=9, listeners=[Listener("A", noted)])) as opened:
        opened.run(made.train)
        opened.run(made.train)
    assert noted.count(("A", "begin")) == 1
    # Fresh, since nothing restores it; saved at both creations and at the end.
    assert saves(noted) == [0, 0, 1]


def test_row_11_graph_pbtxt_is_written_at_session_creation_only(make_any_hook: Make, folder: str) -> None:
    path = os.path.join(folder, "graph.pbtxt")
    made = model()
    with session(make_any_hook(folder, save_steps=2)) as opened:
        assert os.path.exists(path)
        os.remove(path)
        for _ in range(5):
            opened.run(made.train)
    assert not os.path.exists(path)
    assert len(events(folder, "graph_def")) == 2
    # One of each is begin's.
    assert len(events(folder, "meta_graph_def")) == 2


def test_row_13_before_run_asks_for_the_step_read_tensor(make_any_hook: Make, folder: str) -> None:
    model()
    hook = make_any_hook(folder, save_steps=1)
    hook.begin()
    asked = hook.before_run(None)
    assert asked.fetches is hook._global_step_tensor
    assert not asked.feed_dict
    assert not asked.options


def count_runs(hook: Any, runs: int, stride: int = 1) -> list[int]:
    """How often the session ran in each run that has been asked for."""
    counts = Runs()
    made = model(stride)
    # `after_run` is called in this order: what the hook did in one run is counted by the second.
    with session(counts, hook, Do(lambda _: counts.counts.append(counts._count), after=tuple(range(1, 99)))) as opened:
        for _ in range(runs):
            opened.run(made.train)
    return counts.counts[1::2]


def test_rows_14_and_15_the_real_step_is_looked_up_only_where_a_save_may_be_due(make_hook: Make, folder: str) -> None:
    # Runs of 1 step, steps told as 1 a run: the second look happens at steps 3 (or at 2, where the value that was
    # read with it is the newer one), and saving itself is one more run.
    counts = count_runs(make_hook(folder, save_steps=4), 6)
    assert counts[:2] == [1, 1]
    assert counts[3] >= 3
    assert sum(counts) <= 6 + 3


def test_row_14_steps_per_run_widens_the_look_ahead(make_hook: Make, folder: str) -> None:
    assert count_runs(make_hook(folder, save_steps=100, steps_per_run=1000), 3) == [2, 2, 2]


def test_row_15_the_second_look_decides(make_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    train(make_hook(folder, save_steps=4, steps_per_run=50, listeners=[Listener("A", noted)]), 9)
    assert saves(noted) == [0, 4, 8, 9]


@pytest.mark.parametrize("behind", [0, 1])
def test_row_16_the_step_read_with_a_run_may_be_before_or_after_it(make_hook: Make, folder: str, behind: int) -> None:
    noted: list[Event] = []
    with driven(make_hook(folder, save_steps=2, listeners=[Listener("A", noted)])) as driver:
        driver.run(5, behind=behind)
        assert saves(noted) == [0, 2, 4]


@pytest.mark.parametrize(("stride", "expected"), [(1, [0, 3, 6, 7]), (2, [0, 4, 8, 12, 14]), (5, [0, 5, 10, 15])])
def test_row_17_steps_are_counted_from_the_last_save(
    make_hook: Make, folder: str, stride: int, expected: list[int]
) -> None:
    noted: list[Event] = []
    hook = make_hook(folder, save_steps=3, steps_per_run=stride, listeners=[Listener("A", noted)])
    train(hook, 3 if stride == 5 else 7, stride=stride)
    assert saves(noted) == expected


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that TensorFlow's timer reads."""
    made = Clock()
    monkeypatch.setattr(basic_session_run_hooks, "time", made)
    return made


def test_row_18_by_seconds_and_only_if_the_step_has_moved(make_hook: Make, folder: str, clock: Clock) -> None:
    noted: list[Event] = []
    with driven(make_hook(folder, save_secs=10, listeners=[Listener("A", noted)])) as driver:
        driver.run(2)
        clock.now += 9.9
        driver.run(1)
        assert saves(noted) == [0]
        clock.now += 0.1
        driver.run(2)
        assert saves(noted) == [0, 4]
        clock.now += 10
        driver.set_step(3)
        driver.run(1)
        assert saves(noted) == [0, 4]
        driver.run(1)
        assert saves(noted) == [0, 4, 5]


def test_row_19_a_step_set_back_by_steps(make_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    with driven(make_hook(folder, save_steps=4, listeners=[Listener("A", noted)])) as driver:
        driver.run(9)
        driver.set_step(1)
        driver.run(10)
        assert saves(noted) == [0, 4, 8]
        driver.run(1)
        assert saves(noted) == [0, 4, 8, 12]


def test_row_19_a_step_set_back_by_seconds(make_hook: Make, folder: str, clock: Clock) -> None:
    noted: list[Event] = []
    with driven(make_hook(folder, save_secs=10, listeners=[Listener("A", noted)])) as driver:
        driver.run(8)
        clock.now += 10
        driver.run(1)
        driver.set_step(1)
        driver.run(1)
        assert saves(noted) == [0, 9]
        clock.now += 10
        driver.run(1)
        assert saves(noted) == [0, 9, 3]


class SeesTheTimer(Listener):
    """Notes the timer's step during a save."""

    hook: Any

    def before_save(self, session: Any, global_step_value: Any) -> None:
        self.events.append((self.hook._timer.last_triggered_step(), int(global_step_value)))


def test_row_20_the_timer_is_set_before_a_save_but_after_that_at_creation(make_hook: Make, folder: str) -> None:
    noted: list[Event] = []
    listener = SeesTheTimer("A", noted)
    hook = listener.hook = make_hook(folder, save_steps=2, listeners=[listener])
    with driven(hook) as driver:
        assert hook._timer.last_triggered_step() == 0
        driver.run(3)
    assert [event for event in noted if event[0] != "A"] == [(None, 0), (2, 2), (2, 3)]


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
