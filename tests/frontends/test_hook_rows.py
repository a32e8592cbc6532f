"""The hooks' table, row by row: what is decided when. Most tests hold for TensorFlow's hook too.

A `FakeJob` stands for the `Checkpointer`; other rows are in test_hook_rows_told.py and test_hook_rows_files.py.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

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
    driven,
    events,
    model,
    session,
    train,
)

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")

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
