"""Wrong uses of the hooks, and what goes wrong around them: a clear error, and nothing that is committed harmed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from ray.cluster_utils import Cluster

from ray_ckpt import AsyncCheckpointSaverHook, CheckpointSaverHook
from ray_ckpt.errors import FencedError, SaveError, StorageError, UsageError
from tests.frontends.sessions import Event, Listener, driven, logged, model, present, session, steps, train, weights

tf1 = tf.compat.v1
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("fresh_tf")]


class Raises(Listener):
    """Raises when it is told of one thing."""

    def __init__(self, noted: list[Event], what: str, step: int | None = None) -> None:
        super().__init__("A", noted)
        self.what, self.step = what, step

    def begin(self) -> None:
        super().begin()
        if self.what == "begin":
            raise KeyError("listener")

    def _note(self, what: str, session: Any, step: Any) -> None:
        super()._note(what, session, step)
        if (what, int(step)) == (self.what, self.step):
            raise KeyError("listener")


@pytest.mark.parametrize(("what", "step", "saved"), [("before", 2, [0]), ("after", 2, [0, 2]), ("end", 3, [0, 2, 3])])
def test_a_listener_that_raises(fake_job: Any, folder: str, what: str, step: int, saved: list[int]) -> None:
    noted: list[Event] = []
    hook = CheckpointSaverHook(folder, save_steps=2, listeners=[Raises(noted, what, step), Listener("B", noted)])
    with pytest.raises(KeyError, match="listener"):
        train(hook, 3)
    assert noted[-1] == ("A", what, step)
    assert list(fake_job.jobs[0].outcomes) == saved
    # Its list and files are those of a save that is complete.
    assert present(folder, ".meta") == saved


@pytest.mark.parametrize("what", ["begin", "before"])
def test_a_listener_that_raises_at_creation_leaves_nothing_open(fake_job: Any, folder: str, what: str) -> None:
    hook = CheckpointSaverHook(folder, save_steps=2, listeners=[Raises([], what, 0)])
    with pytest.raises(KeyError, match="listener"):
        train(hook, 3)
    assert [job.ended for job in fake_job.jobs] == ["left"] * (what == "before")


def test_a_saver_whose_variables_are_gone(fake_job: Any, folder: str) -> None:
    with tf.Graph().as_default():
        model()
        gone = tf1.train.Saver()
    hook = CheckpointSaverHook(folder, save_steps=2, saver=gone)
    with pytest.raises(UsageError, match=r"'save/\w+:0' is not in the graph of this session: a saver whose variables"):
        train_without_a_saver_of_its_own(hook)
    assert fake_job.jobs == []


def train_without_a_saver_of_its_own(hook: Any) -> None:
    """A session in whose graph there are no ops of any saver."""
    model()
    hook.begin()
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        hook.after_create_session(raw, None)


def test_a_saver_without_variables(fake_job: Any, folder: str) -> None:
    saver = tf1.train.Saver(var_list=[], allow_empty=True)
    with pytest.raises(UsageError, match="has no variables to save"):
        train(CheckpointSaverHook(folder, save_steps=2, saver=saver), 1)
    assert fake_job.jobs == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_a_directory_that_is_a_file(fake_job: Any, tmp_path: Path, url: str, rank: int) -> None:
    path = tmp_path / "file"
    path.write_text("not a directory")
    hook = CheckpointSaverHook(url.format(path), save_steps=2, rank=rank, world_size=2)
    with pytest.raises(UsageError, match="is a file: give a directory"):
        train(hook, 1)
    assert path.read_text() == "not a directory"


def test_a_finalized_graph_is_saved_as_any_other(fake_job: Any, folder: str) -> None:
    made = model()
    saver = tf1.train.Saver()
    hook = CheckpointSaverHook(folder, save_steps=1, saver=saver)
    hook.begin()
    initialize = tf1.global_variables_initializer()
    tf1.get_default_graph().finalize()
    with tf1.Session() as raw:
        raw.run(initialize)
        hook.after_create_session(raw, None)
        raw.run(made.train)
        hook.end(raw)
    assert float(fake_job.jobs[0].values[1]["weights"][0]) == 10.0


def test_a_hook_in_two_sessions_at_a_time(fake_job: Any, folder: str) -> None:
    # Nothing is due or to be told where it is found out.
    hook = CheckpointSaverHook(folder, save_steps=100, blocking=True)
    made = model()
    with session(hook) as second_to_end:
        other = tf1.train.MonitoredSession(hooks=[hook])
        with pytest.raises(UsageError, match="is used in two sessions at a time"):
            second_to_end.run(made.train)
        # The younger one goes on.
        other.run(made.train)
        other.close()
        assert list(fake_job.jobs[1].outcomes) == [0, 1]
        with pytest.raises(UsageError, match="after its end, or before after_create_session"):
            second_to_end.run(made.train)
        second_to_end._hooks.clear()


def test_a_fork(fake_job: Any, folder: str) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=5)
    with driven(hook) as driver:
        child = os.fork()
        if not child:
            # No training here, that would hang. The exit code says what happened; nothing else may run.
            code = 1
            try:
                context = tf1.train.SessionRunContext(None, driver.raw)
                hook.after_run(context, tf1.train.SessionRunValues(np.int64(1), None, None))
            except UsageError as error:
                code = 42 if f"was made in process {os.getppid()}" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        driver.run(1)


def test_a_copy_in_another_process_is_not_a_fork(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    hook = CheckpointSaverHook(folder, save_steps=5)
    sent = pickle.dumps(hook)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "getpid", lambda: -1)
        elsewhere.setattr("ray.is_initialized", lambda: True)
        pickle.loads(sent)._check_process()
        with pytest.raises(UsageError, match="a fork of it"):
            hook._check_process()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_error": "never"}, "on_error must be"),
        ({"writers_per_host": 0}, "writers_per_host must be positive"),
        ({"steps_per_run": 0}, "steps_per_run must be positive"),
        ({"timeouts": 3.0}, "timeouts must be"),
    ],
)
def test_settings_that_cannot_work(folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CheckpointSaverHook(folder, save_steps=1, **settings)


def test_a_graph_that_cannot_be_written(fake_job: Any, folder: str) -> None:
    os.makedirs(os.path.join(folder, "model.ckpt-1.meta", "in the way"))
    with pytest.raises(StorageError, match=r"model\.ckpt-1\.meta"):
        train(CheckpointSaverHook(folder, save_steps=1, blocking=True), 3)
    with logged() as lines:
        train(CheckpointSaverHook(folder, save_steps=1, on_error="warn"), 3)
    assert [line for line in lines if "model.ckpt-1.meta" in line]


def own_threads() -> list[str]:
    """Threads of this package."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ray-ckpt")]


def test_a_save_that_fails_harms_nothing(ray_cluster: Cluster, folder: str) -> None:
    """Whatever name the shards of step 2 get, a directory lies there."""
    noted: list[Event] = []
    for number in range(4):
        os.makedirs(os.path.join(folder, f"model.ckpt-2.data-{number:05d}-of-00004", "in the way"))
    with pytest.raises(SaveError, match=r"step 2 was not saved: .*model\.ckpt-2"):
        train(AsyncCheckpointSaverHook(folder, save_steps=2, listeners=[Listener("A", noted)]), 50)
    assert ("A", "after", 2) not in noted
    assert steps(folder)[0] == 0
    assert 2 not in steps(folder)
    assert train(CheckpointSaverHook(folder, save_steps=2), 1, folder) == 1
    assert weights(folder)[1] == 10.0 * weights(folder)[0]


def test_a_session_that_is_closed_while_a_save_runs(ray_cluster: Cluster, folder: str) -> None:
    hook = AsyncCheckpointSaverHook(folder, save_steps=2)
    made = model()
    tf1.add_to_collection(tf1.GraphKeys.SAVERS, tf1.train.Saver())
    hook.begin()
    with tf1.Session() as raw:
        raw.run(tf1.global_variables_initializer())
        hook.after_create_session(raw, None)
        raw.run(made.train)
        raw.run(made.train)
        hook.after_run(tf1.train.SessionRunContext(None, raw), tf1.train.SessionRunValues(np.int64(2), None, None))
        raw.close()
        with pytest.raises(RuntimeError, match="closed Session"):
            hook.end(raw)
    # What has been snapshotted is saved without the session.
    assert own_threads() == []
    with tf.Graph().as_default():
        made = model()
        with session(CheckpointSaverHook(folder, save_steps=9), folder=folder) as opened:
            assert opened.run(made.weights)[0] in (0.0, 20.0)
    assert weights(folder) in ((0, 0.0), (2, 20.0))


def test_two_jobs_on_one_directory(ray_cluster: Cluster, folder: str) -> None:
    made = model()
    first = CheckpointSaverHook(folder, save_steps=1, blocking=True)
    with pytest.raises(FencedError):
        run_beside_another_job(first, made, folder)
    assert own_threads() == [] or first._saves is not None
    assert weights(folder) == (3, 30.0)
    first._settle_unended()
    assert own_threads() == []


def run_beside_another_job(hook: Any, made: Any, folder: str) -> None:
    """Two steps, then another job comes, trains to step 3 and ends, then more steps."""
    with session(hook, folder=folder) as opened:
        opened.run(made.train)
        opened.run(made.train)
        assert train(CheckpointSaverHook(folder, save_steps=1), 1, folder) == 1
        opened.run(made.train)
