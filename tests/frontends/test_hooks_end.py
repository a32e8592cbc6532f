"""The end of a session: the last step is saved whatever became of the saves before, and what failed is raised after it.

A `FakeJob` stands for the `Checkpointer`: saves are under way until `end` waits for them.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import tensorflow as tf

from ray_ckpt import AsyncCheckpointSaverHook
from ray_ckpt.errors import DamagedError, RayCkptError, SaveError, StorageError, UnavailableError, UsageError
from ray_ckpt.frontends.tensorflow import side_files
from tests.frontends.sessions import Event, Listener, driven, logged, present, train

tf1 = tf.compat.v1
pytestmark = pytest.mark.usefixtures("fresh_tf")


@pytest.fixture
def held_job(fake_job: Any) -> Any:
    """A `FakeJob` whose saves are not decided before somebody waits."""
    fake_job.held = True
    return fake_job


def told(noted: list[Event], what: str = "after") -> list[int]:
    """Steps that the listeners were told of."""
    return [event[2] for event in noted if event[1] == what]


class Raises(Listener):
    """Raises after the saves of some steps."""

    def __init__(self, noted: list[Event], *steps: int) -> None:
        super().__init__("A", noted)
        self.steps = steps

    def after_save(self, session: Any, global_step_value: Any) -> bool:
        super().after_save(session, global_step_value)
        if global_step_value in self.steps:
            raise KeyError(f"listener at step {global_step_value}")
        return False


@pytest.mark.parametrize("raising", [(2,), (0, 2, 3)])
def test_a_listener_that_raises_does_not_cost_the_last_save(
    held_job: Any, folder: str, raising: tuple[int, ...]
) -> None:
    noted: list[Event] = []
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Raises(noted, *raising)])
    with logged() as lines, pytest.raises(KeyError, match=f"listener at step {raising[0]}"):
        train(hook, 3)
    assert told(noted) == [0, 2, 3]
    assert told(noted, "end") == []
    assert 3 in present(folder, ".meta")
    assert len([line for line in lines if "KeyError('listener at step" in line]) == len(raising) - 1
    assert held_job.jobs[0].ended == "left"


def test_a_graph_that_cannot_be_written_does_not_cost_the_last_save(held_job: Any, folder: str) -> None:
    noted: list[Event] = []
    os.makedirs(os.path.join(folder, "model.ckpt-2.meta", "in the way"))
    with pytest.raises(StorageError, match=r"model\.ckpt-2\.meta"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 3)
    assert sorted(held_job.jobs[0].outcomes) == [0, 2, 3]
    assert told(noted) == [0, 3]


def test_several_saves_that_failed_do_not_cost_the_last_one(held_job: Any, folder: str) -> None:
    noted: list[Event] = []
    held_job.fails = frozenset({2, 4})
    with pytest.raises(SaveError, match="step 2 was not saved"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 5)
    assert told(noted) == [0, 5]


def test_a_wait_that_takes_too_long_does_not_cost_the_last_save(
    held_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> None:
        raise UnavailableError("the host is late")

    monkeypatch.setattr(held_job, "wait", late)
    with pytest.raises(UnavailableError, match="the host is late"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2), 3)
    assert list(held_job.jobs[0].values) == [0, 2, 3]


def test_a_last_save_that_failed_is_not_tried_again(fake_job: Any, folder: str) -> None:
    noted: list[Event] = []
    fake_job.fails = frozenset({4})
    hook = AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)], on_error="warn")
    train(hook, 4)
    assert (told(noted, "before"), told(noted)) == ([0, 2, 4], [0, 2])
    assert noted[-1] == ("A", "end", 4)
    assert len(fake_job.jobs) == 1


ERRORS = [StorageError("no space left"), UnavailableError("changed by others"), DamagedError("not a record")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("listens", [True, False])
def test_a_checkpoint_file_that_cannot_be_written(
    fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch, error: RayCkptError, listens: bool
) -> None:
    def failing(store: Any) -> None:
        raise error

    monkeypatch.setattr(side_files, "repair_state_file", failing)
    noted: list[Event] = []
    settings: dict[str, Any] = {"save_steps": 2, "listeners": [Listener("A", noted)] * listens}
    with pytest.raises(type(error), match=str(error)):
        train(AsyncCheckpointSaverHook(folder, **settings), 3)
    noted.clear()
    with logged() as lines:
        train(AsyncCheckpointSaverHook(folder, on_error="warn", **settings), 3)
    assert str(error) in lines
    assert told(noted) == [0, 2, 3] * listens
    assert fake_job.jobs[1].ended == "closed"


def test_the_end_in_a_forked_process(held_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    with driven(hook) as driver:
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: -1)
            for use in (hook.wait, lambda: hook.end(driver.raw), driver.run):
                with pytest.raises(UsageError, match="a fork of it"):
                    use()
            hook._saves.leave()
        assert held_job.jobs[0].ended == ""
    assert held_job.jobs[0].ended == "closed"


def test_a_hook_may_begin_in_a_forked_process(fake_job: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    pid = os.getpid()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with driven(hook) as driver:
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        # A session that was lost, for one.
        hook.after_create_session(driver.raw, None)
    assert [job.ended for job in fake_job.jobs] == ["left", "closed"]
